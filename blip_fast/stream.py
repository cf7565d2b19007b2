"""Streams of any length in bounded memory: work done ahead by threads, and results put back in order."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")
Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
AHEAD = 4  # items per thread


def read_ahead(items: Iterable[Item], read: Callable[[Item], Done], *, threads: int = THREADS,
               ahead: int = AHEAD) -> Iterator[tuple[Item, Done]]:
    """Each item and `read(item)`, in order; threads are up to `ahead` × `threads` items ahead of who takes them.

    The items are drawn by a thread as well, so that the consumer does not wait for a folder to be listed or a shard to
    be fetched. What `items` or `read` raises is raised at its place. No thread goes on once the iterator is closed.
    """
    ready: queue.Queue[tuple[Item, Future[Done]] | BaseException | None] = queue.Queue(ahead * threads)
    closed = threading.Event()
    pool = ThreadPoolExecutor(threads, "read")
    threading.Thread(target=_feed, args=(items, read, pool, ready, closed), name="feed", daemon=True).start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            item, future = entry
            yield item, future.result()
    finally:
        closed.set()
        pool.shutdown(wait=False, cancel_futures=True)
        while not ready.empty():  # the feeding thread may wait for room
            ready.get_nowait()


def _feed(items: Iterable[Any], read: Callable[[Any], Any], pool: ThreadPoolExecutor, ready: queue.Queue[Any],
          closed: threading.Event) -> None:
    try:
        for item in items:
            if closed.is_set():
                return
            ready.put((item, pool.submit(read, item)))
        ready.put(None)
    except BaseException as error:
        if not closed.is_set():  # else it is the pool that is shut
            ready.put(error)


def in_order(results: Iterable[Result], place: Callable[[Result], int]) -> Iterator[Result]:
    """Results that come out of order, each from 0 on once, in the order of their places. Those that are early wait."""
    early: dict[int, Result] = {}
    due = 0
    for result in results:
        early[place(result)] = result
        while due in early:
            yield early.pop(due)
            due += 1
