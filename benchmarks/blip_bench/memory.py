"""The peak memory of a call, measured in a new process."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from blip_bench.timing import Call


class Added(NamedTuple):
    """Resident bytes before a call, and the bytes that its peak adds."""

    before: int
    added: int


def added_memory(make: Callable[..., Call], *arguments: Any) -> Added:
    """The memory added by the second call of `make(*arguments)` in a new process; the first call creates
    threads and buffers that stay.

    `make` must be importable, and its arguments must be picklable. Linux only.
    """
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(_measure, (make, arguments))


def _measure(make: Callable[..., Call], arguments: tuple[Any, ...]) -> Added:
    call = make(*arguments)
    call()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident("VmRSS")
    call()
    return Added(before, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
