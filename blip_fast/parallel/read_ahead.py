"""Streams of any length in bounded memory: work done ahead by threads, and results put back in order."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")
Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
AHEAD = 4  # items per thread


def read_ahead(items: Iterable[Item], read: Callable[[Item], Done], *, threads: int = THREADS,
               ahead: int = AHEAD) -> Iterator[tuple[Item, Done]]:
    """Each item and `read(item)`, in order. Threads are up to `ahead` × `threads` items ahead of the
    consumer.

    The items are drawn by a thread as well, so that the consumer does not wait for a folder to be listed or a
    shard to be fetched. What `items` or `read` raises is raised at its place. No thread goes on once the
    iterator is closed.
    """
    # A signal in the main thread can interrupt Queue, Future or Event while their lock is held, and leave it
    # locked. SimpleQueue locks in C, so the consumer waits only on these two.
    done: queue.SimpleQueue[tuple[int, tuple[Item, Done] | BaseException | None]] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(ahead * threads):
        room.put(None)
    closed = threading.Event()
    pool = ThreadPoolExecutor(threads, "read")
    feeding = (items, read, pool, done, room, closed)
    threading.Thread(target=_feed, args=feeding, name="feed", daemon=True).start()
    try:
        for _, result in in_order(iter(done.get, None), itemgetter(0)):
            room.put(None)
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        closed.set()
        pool.shutdown(wait=False, cancel_futures=True)
        room.put(None)  # the feeding thread may wait for it


def _feed(items: Iterable[Any], read: Callable[[Any], Any], pool: ThreadPoolExecutor,
          done: queue.SimpleQueue[Any], room: queue.SimpleQueue[None], closed: threading.Event) -> None:
    """Put (place, (item, result)) or (place, error) into `done`, and (place, None) after the last item."""
    def work(place: int, item: Any) -> None:
        try:
            done.put((place, (item, read(item))))
        except BaseException as error:
            done.put((place, error))

    place = 0
    try:
        for item in items:
            room.get()
            if closed.is_set():
                return
            pool.submit(work, place, item)
            place += 1
        done.put((place, None))
    except BaseException as error:
        if not closed.is_set():  # else the error is that the pool is shut
            done.put((place, error))


def in_order(results: Iterable[Result], place: Callable[[Result], int]) -> Iterator[Result]:
    """Results in the order of their places, which are 0, 1, … and come in any order. Early ones wait."""
    early: dict[int, Result] = {}
    due = 0
    for result in results:
        early[place(result)] = result
        while due in early:
            yield early.pop(due)
            due += 1
