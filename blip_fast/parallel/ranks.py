"""Work that the processes of one run share (`torchrun`): each does its own part, and all get the whole, in
order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `count`."""

    rank: int = 0
    count: int = 1

    def share(self, work: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """`work(items)`, one result per item. Each process does its part; every process must call this.

        Raises ValueError where some process has another number of results than items.
        """
        mine = list(work(dealt(items, self.rank, self.count)))
        if self.count == 1:
            return merged([mine], len(items))
        parts: list[list[Result]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, mine)
        return merged(parts, len(items))


ALONE = Ranks()


def dealt(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """A rank's part of `items`. They are dealt one by one; none is repeated to make parts equally long."""
    return list(items[rank::ranks])


def merged(parts: Sequence[Sequence[Result]], count: int) -> list[Result]:
    """All ranks' results of their parts of `count` items → results in the items' order.

    Raises ValueError naming the first rank whose results are not as many as its items.
    """
    for rank, part in enumerate(parts):
        own = len(range(rank, count, len(parts)))
        if len(part) != own:
            raise ValueError(f"rank {rank} of {len(parts)} has {len(part)} results of its {own} items")
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, joined for as long as this lasts, each with its own GPU if there are
    any. Without `torchrun` there is one rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # These functions keep the group that exists when they are first imported (by torchao, say), and with it
    # gloo's threads: a process that ends while those run can abort (pytorch issue 190489).
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo")  # results are objects, in host memory
    try:
        yield Ranks(dist.get_rank(), count)
        dist.barrier()  # no rank leaves while another still receives from it
    finally:
        dist.destroy_process_group()
