"""Independent work on a CPU, one piece to a core: no core waits for another within a piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
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
    # The number of threads of a product belongs to the thread that calls it.
    return ThreadPoolExecutor(threads, "core", initializer=lambda: torch.set_num_threads(1))
