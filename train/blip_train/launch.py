"""Starting the ranks of a run. Under torchrun or DeepSpeed's launcher nothing is started: this process is a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from blip_train.recipe import Recipe


def must_launch(recipe: Recipe) -> bool:
    """True where the recipe wants several ranks and no launcher has made this process one of them."""
    return recipe.runtime.ranks > 1 and "RANK" not in os.environ


def launch(recipe: Recipe, resume: bool) -> int:
    """Run the recipe on `runtime.ranks` processes of this machine; returns the first failing rank's exit status, or 0."""
    recipe.directory.mkdir(parents=True, exist_ok=True)
    saved = recipe.directory / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={recipe.runtime.ranks}", "-m", "blip_fast", "train", "--config", str(saved)]
    return subprocess.run([*command, "--resume"] if resume else command, env=rank_environment(), check=False).returncode


def rank_environment() -> dict[str, str]:
    """The environment that DeepSpeed needs: on a CPU its accelerator is named, and `ninja` must be on the path."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
