"""The progress bar of long commands."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def progress_bar(label: str, unit: str, count: Callable[[], int | None],
                 hidden: bool = False) -> Iterator[Callable[[], None]]:
    """A bar with rate and remaining time on the error stream, if that is a terminal. Yields a function that
    advances it by one.

    `count` runs in a thread next to the work. The total is unknown until it returns, or if it returns None.
    """
    if hidden or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=None, rate="")

        def find_total() -> None:
            with suppress(OSError, ValueError):  # the work itself meets the same error and reports it
                progress.update(task, total=count())

        def advance() -> None:
            progress.advance(task)
            speed = progress.tasks[task].speed
            progress.update(task, rate=f"{speed:.1f} {unit}/s" if speed else "")

        threading.Thread(target=find_total, name="count", daemon=True).start()
        yield advance
