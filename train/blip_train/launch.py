"""Starting the ranks of a run. Under torchrun or DeepSpeed's launcher nothing is started: this process is a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from blip_train.guard import STOPPED
from blip_train.prepare import EXPORT, check_directory, check_sources
from blip_train.recipe import Recipe


def carry_out(recipe: Recipe, resume: bool = False, profile: int = 0) -> Path:
    """Run a recipe from start to end, on as many processes as it says, with `profile` of its steps traced.

    Returns:
        The directory of the exported model.

    Raises:
        ValueError: the data is not there, or the run's directory is taken (see `run.train`).
        OSError: a rank failed; its own error stands above on the terminal.
    """
    check_sources(recipe)
    if recipe.runtime.ranks > 1 and "RANK" not in os.environ:
        _launch(recipe, resume, profile)
        return recipe.directory / EXPORT
    from blip_train.run import train  # here, because the process that only launches ranks needs neither

    return train(recipe, resume, profile)


def _launch(recipe: Recipe, resume: bool, profile: int) -> None:
    """Start `runtime.ranks` processes of this machine under torchrun and wait for them."""
    check_directory(recipe, resume)
    recipe.directory.mkdir(parents=True, exist_ok=True)
    saved = recipe.directory / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={recipe.runtime.ranks}", "-m", "blip_fast", "train", "--config", str(saved)]
    command += ["--resume"] if resume else []
    command += ["--profile", str(profile)] if profile else []
    threads = max((os.cpu_count() or 1) // recipe.runtime.ranks, 1)  # ranks of one machine share its cores
    environment = {"OMP_NUM_THREADS": str(threads)} | rank_environment()
    asked = []
    with subprocess.Popen(command, env=environment) as ranks:
        def hand_on(*_: Any) -> None:  # to torchrun, which hands it on to the ranks: they save, see guard.py
            asked.append(True)
            ranks.terminate()

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            status = ranks.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if asked:
        sys.exit(STOPPED)
    if status:
        raise OSError(f"the run {recipe.name} ended with exit status {status}: the first failing rank's error is above")


def rank_environment() -> dict[str, str]:
    """The environment that DeepSpeed needs: on a CPU its accelerator is named, and `ninja` must be on the path."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
