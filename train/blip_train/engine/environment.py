"""The environment of a process that trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def rank_environment() -> dict[str, str]:
    """The environment that DeepSpeed needs: on a CPU its accelerator is named, and `ninja` must be on the path."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
