"""Checkpoints of a run: everything that a resume needs, in one directory per step.

`runs/NAME/checkpoints/step-N/` holds DeepSpeed's files (weights, momentum copy, queue, τ, optimiser shards),
`stream-S.pt` with the position of each reader of the data, and `run.json`, which says how it was written.
Random numbers need no state, because each batch brings a seed. `latest` names the newest complete directory.
It is replaced last, so a run that is killed while saving resumes from the checkpoint before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blip_fast.data.input.pipeline import TrainInput
from blip_train import collectives
from blip_train.checkpoint.reshard import load_resharded
from blip_train.checkpoint.writer import Writer
from blip_train.engine.step_slots import Streams
from blip_train.recipe import RuntimeRecipe

LATEST = "latest"
RUN = "run.json"


@dataclass(frozen=True)
class Written:
    """How a checkpoint was written: after `step` steps, of which `updates` changed the weights; by
    `ranks` ranks with this `zero_stage` and `optimizer`, on batches from these `streams` and `slots`, by
    this `version` of blip_fast. `model` is the model's configuration; `precision` the run's, None if an
    earlier version wrote the file."""

    step: int
    updates: int
    ranks: int
    zero_stage: int
    optimizer: str
    streams: int
    slots: int
    version: str
    model: dict[str, Any]
    precision: str | None = None


def save(engine: Any, directory: Path, step: int, streams: Streams, input_states: dict[int, Any],
         runtime: RuntimeRecipe, writer: Writer) -> None:
    """Write `step-N`, make it the latest, and remove older ones. Waits first for a
    checkpoint still being written.

    Args:
        engine: DeepSpeed's engine.
        directory: the run's `checkpoints` directory.
        input_states: the position of each stream that this rank reads.
        runtime: how many to keep, and the resolved precision.
        writer: writes at once or in the background; then it raises errors later.

    Raises:
        OSError: this rank could not write its part, for example because the disk is full. The
            checkpoint before stays the latest.
    """
    name = f"step-{step:08d}"
    explaining = partial(_write_errors, directory, name)
    writer.wait()
    with explaining():
        engine.save_checkpoint(str(directory), tag=name, save_latest=False,
                               client_state={"loss_scaler": engine.optimizer.loss_scaler})
        for stream, state in input_states.items():
            writer.put(state, directory / name / f"stream-{stream}.pt")
        if collectives.world()[0] == 0:
            written = Written(step, engine.global_steps - engine.skipped_steps,
                              *_ranks_stage_optimizer(engine), streams.streams,
                              streams.slots, version("blip-fast"), engine.module.model.config.to_dict(),
                              runtime.precision)
            (directory / name / RUN).write_text(json.dumps(asdict(written)))
    writer.finish(explaining, partial(_make_latest, directory, name, runtime.keep_checkpoints))


def _make_latest(directory: Path, name: str, keep: int) -> None:
    new = directory / f"{LATEST}.new"
    new.write_text(name)
    new.replace(directory / LATEST)
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load(engine: Any, directory: Path, streams: Streams, sources: dict[int, TrainInput]) -> int:
    """Restore the newest checkpoint of `directory` into the engine and the readers.
    Returns the number of finished steps.

    With the number of ranks, ZeRO stage and optimiser that wrote it, the run continues bit for bit as it
    would have; with others the same up to the order in which numbers are added.

    Raises:
        ValueError: there is none, or its batches came from another number of readers or slots.
    """
    folders = whole(directory)
    if not folders:
        raise ValueError(f"{directory} holds no checkpoint to resume from: start without --resume")
    folder = folders[-1]
    # An unfinished directory, left by a run that ended while saving, would count as newest.
    if collectives.world()[0] == 0:
        for unfinished in (old for old in directory.glob("step-*") if old.name > folder.name):
            shutil.rmtree(unfinished)
    written = read_written(folder)
    if (written.slots, written.streams) != (streams.slots, streams.streams):
        raise ValueError(
            f"{folder} is of a run with {written.slots} batches a step from {written.streams} reader(s) of "
            f"the data, and this one has {streams.slots} from {streams.streams}: set runtime.streams to "
            f"{written.streams} and runtime.accumulation so that ranks × accumulation is {written.slots}")
    ranks, stage, optimizer = _ranks_stage_optimizer(engine)
    same_shards = (written.ranks, written.zero_stage) == (ranks, stage) or written.zero_stage == stage == 0
    if same_shards and written.optimizer == optimizer:
        _, client_state = engine.load_checkpoint(str(directory), tag=folder.name)
        engine.optimizer.loss_scaler = client_state["loss_scaler"]
    else:
        load_resharded(engine, folder, written.zero_stage, written.updates)
    for stream, source in sources.items():
        # weights_only=False: the file is this run's own, and holds more than tensors.
        source.load_state_dict(torch.load(folder / f"stream-{stream}.pt", weights_only=False))
    return written.step


def whole(directory: Path) -> list[Path]:
    """The directories of complete checkpoints, oldest first: those up to the latest."""
    latest = directory / LATEST
    name = latest.read_text().strip() if latest.exists() else ""
    return sorted(folder for folder in directory.glob("step-*") if folder.name <= name)


def read_written(folder: Path) -> Written:
    """How the checkpoint in `folder` was written."""
    return Written(**json.loads((folder / RUN).read_text()))


def _ranks_stage_optimizer(engine: Any) -> tuple[int, int, str]:
    """Ranks, ZeRO stage and optimiser (`torch.optim.adamw.AdamW`)."""
    kind = type(engine.basic_optimizer)
    return collectives.world()[1], engine.zero_optimization_stage(), f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def _write_errors(directory: Path, name: str) -> Iterator[None]:
    """Turn an error of writing a checkpoint into an OSError that names the free space, a checkpoint's
    size and the last complete one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # A RuntimeError counts only if it comes from torch.save's writer.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "a file could not be written"
        before = whole(directory)[-1:]
        took = sum(file.stat().st_size for folder in before for file in folder.iterdir())
        free = f"{shutil.disk_usage(directory).free / 1e6:,.1f} MB are free there"
        raise OSError(f"checkpoint {name} could not be written to {directory}: {reason} ({free}" +
                      (f"; {before[0].name} takes {took / 1e6:,.1f} MB and is whole" if before else "") +
                      "): make room, or lower runtime.keep_checkpoints") from error
