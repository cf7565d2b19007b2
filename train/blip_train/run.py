"""A training run from its recipe to its exported model: prepare, step, log, save, resume."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from blip_fast.checkpoint import save_native
from blip_fast.data.pipeline import InputConfig, TrainInput
from blip_fast.tokenizer import Tokenizer
from blip_train import checkpoints, collectives
from blip_train.adapters import merged, save_adapters
from blip_train.batches import Batches
from blip_train.engine import TrainingEngine, mean_losses, seed_everything, start_rank
from blip_train.guard import STOPPED
from blip_train.logs import RunLog
from blip_train.prepare import (
    ADAPTERS,
    EXPORT,
    check_directory,
    check_sources,
    collation,
    prepare_shards,
    prepare_step,
    prepare_tokenizer,
)
from blip_train.pretraining import StepOutput
from blip_train.recipe import Recipe
from blip_train.report import write_run_report
from blip_train.schedule import alpha_at


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Carry out a recipe on this rank. Returns the directory of the exported model (`runs/NAME/model`, native layout).

    Args:
        recipe: the run.
        resume: go on from the newest checkpoint of `runs/NAME`.

    Raises:
        ValueError: the run's directory holds a run and `resume` is not set, or the data is not there.
    """
    check_sources(recipe)
    check_directory(recipe, resume)
    directory = recipe.directory
    device = start_rank()
    rank, _ = collectives.world()
    seed_everything(recipe.seed)
    shards, tokenizer = _prepare(recipe)
    # Every rank builds the same weights; afterwards each draws its own negatives and drop-outs.
    torch.manual_seed(recipe.seed)
    pretraining = prepare_step(recipe, tokenizer)
    engine = TrainingEngine(pretraining.train(), recipe, device)
    seed_everything(recipe.seed)
    with engine.guard.listening():
        ended = _steps(recipe, engine, _open_input(recipe, shards, device), tokenizer, resume)
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


def _prepare(recipe: Recipe) -> tuple[Path, Tokenizer]:
    """Shards and tokenizer: made by rank 0, read by all."""
    saved = recipe.directory / "tokenizer"
    if collectives.world()[0] == 0:
        recipe.directory.mkdir(parents=True, exist_ok=True)
        (recipe.directory / "recipe.yaml").write_text(recipe.to_yaml())
        shards = prepare_shards(recipe)
        if not saved.exists():
            prepare_tokenizer(recipe, shards).save(saved)
    dist.barrier()
    return prepare_shards(recipe), Tokenizer.from_pretrained(saved)


def _open_input(recipe: Recipe, shards: Path, device: torch.device) -> TrainInput:
    rank, ranks = collectives.world()
    data = recipe.data
    config = InputConfig(
        shards=[str(shards)], image_size=recipe.model.vision.image_size, batch_size=recipe.runtime.batch_size,
        seed=recipe.seed, crop_scale=data.crop_scale, flip=data.flip, rand_augment=data.rand_augment,
        shuffle_buffer=data.shuffle_buffer, threads=data.threads, max_words=data.max_words, prompt=data.prompt,
        pairs="reasoning" in recipe.objective.losses)
    return TrainInput(config, rank=rank, world_size=ranks, device=device)


def _steps(recipe: Recipe, engine: TrainingEngine, source: TrainInput, tokenizer: Tokenizer, resume: bool) -> bool:
    """Step until the schedule ends or SIGTERM comes; log and save as the recipe says. Returns whether it ended."""
    runtime, folder = recipe.runtime, recipe.directory / "checkpoints"
    steps_per_epoch = source.steps_per_epoch / runtime.accumulation
    total = recipe.schedule.total_steps(steps_per_epoch)
    step = 0
    if resume:
        progress = checkpoints.load(engine.engine, folder)
        step = progress.step
        source.load_state_dict(progress.input_state)
    log = RunLog(recipe.directory, recipe.name, step, total, writes=collectives.world()[0] == 0)
    batches = Batches(source, collation(recipe, tokenizer), engine.device)
    window, since, waited = 0, time.perf_counter(), 0.0
    while step < total:
        alpha = alpha_at(step, steps_per_epoch, recipe.objective.alpha, recipe.objective.alpha_ramp_epochs)
        lr = recipe.schedule.lr_at(step, steps_per_epoch)
        outputs = engine.step(batches, alpha, lr, step < recipe.objective.language_first_steps)
        step, window = step + 1, window + 1
        if step % runtime.log_every == 0 or step == total:
            pairs = window * runtime.batch_size * runtime.accumulation * collectives.world()[1]
            log.row(step, _row(engine, outputs) | {
                "epoch": step / steps_per_epoch, "lr": lr, "data_wait": (batches.waited - waited) / window,
                "pairs_per_second": pairs / (time.perf_counter() - since)})
            window, since, waited = 0, time.perf_counter(), batches.waited
        if step % runtime.save_every == 0 or step == total or engine.guard.stopping:
            checkpoints.save(engine.engine, folder, checkpoints.Progress(step, batches.state),
                             runtime.keep_checkpoints)
        if engine.guard.stopping:
            break
    batches.close()
    log.close()
    return step == total


def _row(engine: TrainingEngine, outputs: list[StepOutput]) -> dict[str, float]:
    """What an optimiser step's batches say of themselves, for the log."""
    row = mean_losses(outputs) | {"skipped": engine.guard.skipped}
    if "itc" in outputs[-1].losses:
        row["temperature"] = engine.pretraining.model.temperature.item()
    if outputs[-1].exchanged is not None:
        row["exchanged_mb"], row["gathering_mb"] = (count / 1e6 for count in outputs[-1].exchanged)
    return row
