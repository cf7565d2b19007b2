"""Every kernel launch passes here. On a GPU it runs; in Triton's interpreter it runs on the CPU.

`blip_kernels.compiled.aot` takes note of it instead, with the very arguments, hints and configuration, and compiles it
for a GPU that is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported
GENERATIONS = (80, 90, 100)  # compute capabilities with launch configurations of their own

# (kernel, grid, arguments, keyword arguments) of a launch that is noted down instead of run
Note = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_noting: tuple[int, Note] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid`, unless the grid is empty. `meta`: its constexprs, num_warps and num_stages."""
    if _noting is not None:
        _noting[1](kernel, grid, args, meta)
    elif min(grid) > 0:
        kernel[grid](*args, **meta)


@contextmanager
def noting(generation: int, note: Note) -> Iterator[None]:
    """Within, launches are handed to `note` as if on a GPU of `generation` (80, 90 or 100); tensors may be `meta`."""
    global _noting
    _noting = (generation, note)
    try:
        yield
    finally:
        _noting = None


def generation(device: torch.device) -> int:
    """Which of `GENERATIONS` a launch on `device` is configured for: the newest that is not newer than the device. But
    Blackwell's workstation chips (12.x) have Ampere's tensor cores and 99 KiB of shared memory, and are launched so."""
    if _noting is not None:
        return _noting[0]
    if device.type != "cuda":
        return GENERATIONS[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return GENERATIONS[0]
    return max((g for g in GENERATIONS if g <= 10 * major + minor), default=GENERATIONS[0])


def why_not(x: Tensor) -> str | None:
    """Why Triton cannot run a call on `x`, or None where it can."""
    if x.device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
            return "its kernels need an NVIDIA GPU of compute capability 8.0 or newer"
        return None
    if x.device.type == "meta" and _noting is not None:
        return None
    if x.device.type == "cpu":
        return None if INTERPRETED else "the tensors are on a CPU (TRITON_INTERPRET=1 interprets kernels there, slowly)"
    return f"the tensors are on {x.device}"
