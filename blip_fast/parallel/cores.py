"""Independent work on a CPU, one piece per core: no core waits for another within a piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_on_a_core(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, in order, without gradients. As many run at a time as PyTorch has threads
    (`torch.set_num_threads`), each on one thread of its own."""
    inference = torch.is_inference_mode_enabled()

    def on_one_thread(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    return list(_workers(torch.get_num_threads()).map(on_one_thread, items))


@lru_cache
def _workers(threads: int) -> ThreadPoolExecutor:
    pool, all_there = ThreadPoolExecutor(threads, "core", initializer=_on_one_thread), Barrier(threads)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    # The number is that of the thread that sets it and of threads that begin later; those should have the
    # caller's.
    torch.set_num_threads(threads)
    return pool


def _on_one_thread() -> None:
    # a thread takes the process's number when it is first asked, even over one that was set before
    torch.get_num_threads()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows; threads do not outlive a fork
    os.register_at_fork(after_in_child=_workers.cache_clear)
