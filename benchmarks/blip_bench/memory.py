"""What a call adds, at its peak, to the memory of a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from blip_bench.timing import Call


class Added(NamedTuple):
    """Resident bytes before a call, and what its peak adds."""

    before: int
    added: int


def added_memory(make: Callable[..., Call], *arguments: Any) -> Added:
    """What a second call of `make(*arguments)` adds, in a new process; the first leaves threads and buffers that stay.

    `make` is a function of a module, its arguments can be pickled. Linux only.
    """
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(_measure, (make, arguments))


def _measure(make: Callable[..., Call], arguments: tuple[Any, ...]) -> Added:
    call = make(*arguments)
    call()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    call()
    return Added(before, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
