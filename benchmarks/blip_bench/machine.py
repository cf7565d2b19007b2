"""The machine that was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from blip_kernels.cpu.processor import instruction_set


def machine() -> dict[str, Any]:
    """The processor, its instruction sets, cores, threads and versions: these are shown with every figure."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "instructions": instruction_set(), "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}


def _cpu_model() -> str:
    """The name with family and model number, since a virtual machine may show only the vendor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    numbers = ", ".join(f"{name} {known[name]}" for name in ("cpu family", "model") if name in known)
    return f"{known.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()
