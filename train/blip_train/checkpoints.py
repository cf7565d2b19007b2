"""Checkpoints of a run: all that a resume needs, in one directory per step.

`runs/NAME/checkpoints/step-N/` holds DeepSpeed's files (weights, momentum copy, queue, τ, optimiser shards) and one
`rank-R.pt` per rank (random generators, position in the data). `latest` names the newest complete one: it is replaced
last, so a run that is killed while saving resumes from the one before.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from blip_train import collectives

LATEST = "latest"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` optimiser steps done, and the reader's own state."""

    step: int
    input_state: dict[str, Any]


def save(engine: Any, directory: Path, progress: Progress, keep: int) -> None:
    """Write `step-N`, make it the latest, and remove all but the last `keep`.

    Args:
        engine: DeepSpeed's engine.
        directory: the run's `checkpoints` directory.
    """
    rank, ranks = collectives.world()
    name = f"step-{progress.step:08d}"
    engine.save_checkpoint(str(directory), tag=name, save_latest=False, client_state={})
    torch.save({"progress": {"step": progress.step, "input_state": progress.input_state, "ranks": ranks},
                "python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None},
               directory / name / f"rank-{rank}.pt")
    dist.barrier()
    if rank == 0:
        new = directory / f"{LATEST}.new"
        new.write_text(name)
        new.replace(directory / LATEST)
        for old in sorted(directory.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(engine: Any, directory: Path) -> Progress:
    """Restore the newest checkpoint of `directory` into the engine and the random generators of this rank.

    Raises:
        ValueError: there is none, or it was written by another number of ranks.
    """
    rank, ranks = collectives.world()
    latest = directory / LATEST
    if not latest.exists():
        raise ValueError(f"{directory} holds no checkpoint to resume from: start without --resume")
    name = latest.read_text().strip()
    state_file = directory / name / f"rank-{rank}.pt"
    written = len(list((directory / name).glob("rank-*.pt")))
    if written != ranks:
        raise ValueError(f"{directory / name} was written by {written} rank(s) and this run has {ranks}: resume with "
                         f"--runtime.ranks {written}")
    engine.load_checkpoint(str(directory), tag=name)
    # weights_only=False: the file holds Python's and NumPy's generator states; it is this run's own.
    state = torch.load(state_file, weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    return Progress(state["progress"]["step"], state["progress"]["input_state"])
