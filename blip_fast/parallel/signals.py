"""How a long run is stopped from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """SIGTERM; SIGINT is a plain KeyboardInterrupt."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a run that a signal ended: 128 plus the signal's number."""
    return 143 if isinstance(stop, Stopped) else 130


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `Stopped` in the main thread, as Ctrl-C raises KeyboardInterrupt."""
    def stop(number: int, frame: object) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
