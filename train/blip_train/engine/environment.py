"""The environment of a process that trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def rank_environment() -> dict[str, str]:
    """The environment that DeepSpeed needs: `ninja` on the path, and on a CPU the name of its accelerator."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
