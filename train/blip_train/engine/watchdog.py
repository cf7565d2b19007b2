"""Ends a rank that hangs, and names the step, the phase, and the ranks that did not arrive.

A collective waits for its last rank. If that rank is frozen, gloo's own time-out often does not fire, and
NCCL's names an operation but no step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from blip_train.collectives import world

STDERR = 2
TICK = 5.0  # most seconds between two checks, and between two reports to the other ranks
STORE_TIMEOUT = 5.0  # seconds to wait for the other ranks' places
FALLBACK = 30.0  # seconds after the time-out at which faulthandler ends a process whose threads cannot run


@dataclass
class Place:
    """Where a rank is: in `phase` of `step`, the run's `entered`th phase. `heard`:
    UNIX time of its last report."""

    step: int = 0
    phase: str = "start"
    entered: int = 0
    heard: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watchdog:
    """A thread that ends this process when a phase takes too long, so that the launcher ends the other ranks.

    It counts its own ticks instead of reading the clock, so that a process that was suspended and
    continues is not ended for the time in between. (If that exceeds `timeout` + `FALLBACK`,
    faulthandler's timer ends it all the same.)

    Attributes:
        step: the optimiser step that the phases belong to, from 1.

    Args:
        timeout: seconds that each phase may take.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.step = timeout, 0
        self._place = Place()
        self._store: TCPStore | None = None

    def enter(self, phase: str) -> None:
        """Begin a phase of the step. All ranks enter the same phases in the same order."""
        self._place = Place(self.step, phase, self._place.entered + 1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, each phase may take `timeout` seconds."""
        if world()[1] > 1:  # a connection of its own, because the process group's may be busy waiting
            self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                   timeout=timedelta(seconds=STORE_TIMEOUT))
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, ended: threading.Event) -> None:
        tick = min(self.timeout / 4, TICK)
        seen, quiet = self._place.entered, 0.0
        self._report()
        while not ended.wait(tick):
            # If the interpreter's lock or the store blocks this thread, faulthandler's, which
            # needs neither, ends the process.
            faulthandler.dump_traceback_later(self.timeout + FALLBACK, exit=True)
            quiet = quiet + tick if self._place.entered == seen else 0.0
            seen = self._place.entered
            self._report()
            if quiet >= self.timeout:
                self._end()

    def _report(self) -> None:
        if self._store is None:
            return
        try:
            self._store.set(_key(world()[0]), json.dumps(asdict(self._place) | {"heard": time.time()}))
        except RuntimeError:  # the store's process is gone; the collectives will report that
            self._store = None

    def _end(self) -> None:
        places: dict[int, Place] = {}
        reading = threading.Thread(target=self._read, args=(places,), daemon=True)
        reading.start()
        reading.join(STORE_TIMEOUT)
        sentence = describe(world()[0], self._place, self.timeout, dict(places), time.time())
        # Written to the file descriptor, because the progress bar redirects sys.stderr.
        os.write(STDERR, f"\nblip-fast: {sentence}\nblip-fast: where rank {world()[0]} stands:\n".encode())
        faulthandler.dump_traceback(STDERR)
        get_error_handler().record_exception(TimeoutError(sentence))  # for the launcher
        os._exit(1)

    def _read(self, places: dict[int, Place]) -> None:
        if self._store is None:
            return
        for rank in range(world()[1]):
            if self._store.check([_key(rank)]):
                places[rank] = Place(**json.loads(self._store.get(_key(rank))))


def describe(rank: int, place: Place, timeout: float, places: dict[int, Place], now: float) -> str:
    """The message for a phase that did not end. Ranks whose last report is old, or of an
    earlier phase, did not arrive."""
    late = [f"rank {other} did not arrive within {timeout:g} s (last heard of {now - at.heard:.0f} s ago "
            f"in {at})"
            for other, at in sorted(places.items())
            if other != rank and (at.entered < place.entered or now - at.heard > timeout / 2)]
    return f"{place}: " + ("; ".join(late) if late else
                           f"rank {rank} did not get through within {timeout:g} s, and no other rank is "
                           "behind it")


def _key(rank: int) -> str:
    return f"blip_fast/place/{rank}"
