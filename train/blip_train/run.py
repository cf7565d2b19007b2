"""A training run from its recipe to its exported model: prepare, step, log, save, resume."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from blip_fast.checkpoint import save_native
from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source
from blip_fast.inference.precision import explained, resolve, say
from blip_fast.model.tokenizer import Tokenizer
from blip_train import collectives
from blip_train.adapters import merged, save_adapters
from blip_train.checkpoint import checkpoints
from blip_train.checkpoint.writer import Writer
from blip_train.engine.agreement import STOPPED
from blip_train.engine.batches import Batches
from blip_train.engine.engine import TrainingEngine, mean_losses, start_rank
from blip_train.engine.step_slots import Streams
from blip_train.logs.meter import Meter
from blip_train.logs.profiling import StepProfiler
from blip_train.logs.run_log import RunLog
from blip_train.prepare import (
    ADAPTERS,
    EXPORT,
    TOKENIZER,
    collation,
    prepare_shards,
    prepare_step,
    prepare_tokenizer,
)
from blip_train.recipe import Recipe
from blip_train.run_report import write_run_report
from blip_train.schedule import alpha_at
from blip_train.steps.step import StepContext, StepOutput


def train(recipe: Recipe, resume: bool = False, profile: int = 0) -> Path:
    """Carry out a recipe on this rank. Returns the directory of the exported model
    (`runs/NAME/model`, native layout).

    `launch.carry_out` has checked that the data is there and the run's directory free.

    Args:
        recipe: the run.
        resume: continue from the newest checkpoint of `runs/NAME`.
        profile: how many steps to trace (`profiling.StepProfiler`).
    """
    directory = recipe.directory
    device = start_rank()
    rank, _ = collectives.world()
    recipe = _with_precision(recipe, resume, device)
    streams = _streams(recipe)
    shards, tokenizer = _prepare(recipe)
    torch.manual_seed(recipe.seed)  # every rank builds the same weights
    engine = TrainingEngine(prepare_step(recipe, tokenizer).train(), recipe, device)
    sources = {stream: _open_input(recipe, shards, device, stream, streams.streams)
               for stream in dict.fromkeys(streams.of_rank(rank))}
    with engine.agreement.listening(), engine.watchdog.watching():
        ended = _steps(recipe, engine, sources, streams, tokenizer, resume, profile if rank == 0 else 0)
    if not ended:
        if rank == 0:
            print(f"blip-fast: SIGTERM: {recipe.name} is saved, go on with --resume", file=sys.stderr)
        sys.exit(STOPPED)
    with engine.whole_model() as model:
        if rank == 0:
            if recipe.adapters is not None:
                save_adapters(model, directory / ADAPTERS)
                model = merged(model)
            save_native(model, tokenizer, directory / EXPORT)
    if rank == 0:
        write_run_report(recipe, directory / EXPORT)
    dist.barrier()
    return directory / EXPORT


def _with_precision(recipe: Recipe, resume: bool, device: torch.device) -> Recipe:
    """The recipe with the precision of the whole run, which is printed in one line. `auto` becomes the
    precision of the checkpoint that the run resumes from, else what rank 0's device multiplies best."""
    name = recipe.runtime.precision
    folders = checkpoints.whole(recipe.directory / "checkpoints") if resume and name == "auto" else []
    earlier = checkpoints.read_written(folders[-1]).precision if folders else None
    chosen = [resolve(earlier or name, device)]
    rank, ranks = collectives.world()
    if ranks > 1:
        dist.broadcast_object_list(chosen, device=device)
    if rank == 0:
        say(explained(earlier or name, device))
    return dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, precision=chosen[0]))


def _streams(recipe: Recipe) -> Streams:
    ranks = collectives.world()[1]
    return Streams(ranks * recipe.runtime.accumulation, recipe.runtime.streams or ranks, ranks)


def _prepare(recipe: Recipe) -> tuple[list[Source], Tokenizer]:
    """Shards and tokenizer. Rank 0 makes them, all ranks read them."""
    saved = recipe.directory / TOKENIZER
    if collectives.world()[0] == 0:
        recipe.directory.mkdir(parents=True, exist_ok=True)
        (recipe.directory / "recipe.yaml").write_text(recipe.to_yaml())
        shards = prepare_shards(recipe)
        if not saved.exists():
            prepare_tokenizer(recipe, shards).save(saved)
    dist.barrier()
    return prepare_shards(recipe), Tokenizer.from_pretrained(saved)


def _open_input(recipe: Recipe, shards: list[Source], device: torch.device, stream: int,
                streams: int) -> TrainInput:
    data = recipe.data
    config = InputConfig(
        sources=shards, cache=data.cache, cache_gb=data.cache_gb, image_size=recipe.model.vision.image_size,
        batch_size=recipe.runtime.batch_size, seed=recipe.seed,
        crop_scale=data.crop_scale, flip=data.flip, rand_augment=data.rand_augment,
        shuffle_buffer=data.shuffle_buffer, threads=data.threads, max_words=data.max_words,
        prompt=data.prompt, pairs=recipe.step_kind.two_images)
    return TrainInput(config, rank=stream, world_size=streams, device=device)


def _steps(recipe: Recipe, engine: TrainingEngine, sources: dict[int, TrainInput], streams: Streams,
           tokenizer: Tokenizer, resume: bool, profile: int) -> bool:
    """Step until the schedule ends or SIGTERM comes; log and save as the recipe says. Returns
    whether the schedule ended."""
    runtime, folder = recipe.runtime, recipe.directory / "checkpoints"
    rank, _ = collectives.world()
    steps_per_epoch = next(iter(sources.values())).steps_per_epoch * streams.streams / streams.slots
    total = recipe.schedule.total_steps(steps_per_epoch)
    step = checkpoints.load(engine.engine, folder, streams, sources) if resume else 0
    log = RunLog(recipe.directory, recipe.name, step, total, writes=rank == 0)
    collate = collation(recipe, tokenizer)
    batches = {stream: Batches(source, collate, engine.device, recipe.seed)
               for stream, source in sources.items()}
    writer = Writer(engine.engine, runtime.background_saves)
    slots = [batches[stream] for stream in streams.of_rank(rank)]
    meter = Meter(recipe, engine.training_step.model.config, batches.values(), engine.device)
    profiler = StepProfiler(profile, recipe.directory / "profile")
    while step < total:
        engine.watchdog.step = step + 1
        lr = recipe.schedule.lr_at(step, steps_per_epoch)
        context = _context(recipe, step, steps_per_epoch)
        outputs = engine.step(slots, lr, context)
        profiler.step()
        meter.step(context.language_only)
        step += 1
        engine.watchdog.enter("log")
        if step % runtime.log_every == 0 or step == total:
            quarantined = sum(len(source.quarantine) for source in sources.values())
            log.row(step, _row(engine, outputs) | meter.row() | {
                "epoch": step / steps_per_epoch, "lr": lr, "quarantined": quarantined})
        if step % runtime.save_every == 0 or step == total or engine.agreement.stopping:
            engine.watchdog.enter("save")
            states = {stream: each.state for stream, each in batches.items()}
            checkpoints.save(engine.engine, folder, step, streams, states, runtime, writer)
        writer.check()
        if engine.agreement.stopping:
            break
    writer.close()
    for each in batches.values():
        each.close()
    log.close()
    profiler.close()
    return step == total


def _context(recipe: Recipe, step: int, steps_per_epoch: float) -> StepContext:
    """The context of optimiser step `step`, from 0."""
    objective = recipe.objective
    return StepContext(alpha_at(step, steps_per_epoch, objective.alpha, objective.alpha_ramp_epochs),
                       language_only=step < objective.language_first_steps)


def _row(engine: TrainingEngine, outputs: list[StepOutput]) -> dict[str, float]:
    """The log's fields about an optimiser step's batches."""
    agreement = engine.agreement
    row = mean_losses(outputs) | {"skipped": agreement.skipped, "skipped_updates": agreement.skipped_updates}
    if engine.recipe.runtime.precision == "float16":
        row["loss_scale"] = engine.updates.loss_scale
    return row | engine.training_step.log_fields(outputs[-1])
