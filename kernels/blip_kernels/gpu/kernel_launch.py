"""Every kernel launch goes through `launch`: it runs on a GPU, or in Triton's interpreter on the CPU.

`blip_kernels.compiled.aot` records launches instead of running them, with the same arguments, hints and
configuration, and compiles them for a GPU that is not present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported
GENERATIONS = (80, 90, 100)  # compute capabilities that have launch configurations

# (kernel, grid, arguments by name) of a launch that is recorded instead of run
Note = Callable[[Any, tuple[int, ...], dict[str, Any]], None]
_noting: tuple[int, Note] | None = None


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Run `kernel` over `grid`, unless the grid is empty.

    Arguments: all parameters of the kernel by name (Triton reserves `stream`, `device` and `grid`), num_warps
    and num_stages.
    """
    if _noting is not None:
        _noting[1](kernel, grid, arguments)
    elif min(grid) > 0:
        kernel[grid](**arguments)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of tensors [(segments,) rows, heads, head_dim] by the names that kernels give them.

    The rows of tensor `k` have the stride s_k, its heads s_kh, and its segments, if it has any, s_ks.
    """
    return {f"s_{name}{axis}": stride for name, x in tensors.items()
            for axis, stride in zip(("h", "", "s"), x.stride()[-2::-1], strict=False)}


@contextmanager
def noting(generation: int, note: Note) -> Iterator[None]:
    """Inside, launches go to `note` as if on a GPU of `generation` (80, 90, 100); tensors may be `meta`."""
    global _noting
    _noting = (generation, note)
    try:
        yield
    finally:
        _noting = None


def generation(device: torch.device) -> int:
    """Return which of `GENERATIONS` launches on `device` are configured for: the newest up to its own.

    Blackwell's workstation chips (12.x) have Ampere's tensor cores and 99 KiB of shared memory, so they are
    launched as Ampere.
    """
    if _noting is not None:
        return _noting[0]
    if device.type != "cuda":
        return GENERATIONS[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return GENERATIONS[0]
    return max((g for g in GENERATIONS if g <= 10 * major + minor), default=GENERATIONS[0])


def why_not(x: Tensor) -> str | None:
    """Return why Triton cannot run a call on `x`, or None if it can."""
    if x.device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
            return "its kernels need an NVIDIA GPU of compute capability 8.0 or newer"
        return None
    if x.device.type == "meta" and _noting is not None:
        return None
    if x.device.type == "cpu":
        return None if INTERPRETED else "the tensors are on a CPU (TRITON_INTERPRET=1 interprets kernels there, slowly)"
    return f"the tensors are on {x.device}"
