"""The interface between a command and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace


@dataclass(frozen=True)
class Command:
    """One command.

    `arguments` adds its options to a parser. `run` does the work and returns the exit status (None is 0). For
    bad input it raises ValueError or OSError with one clear sentence, which the command line prints before it
    exits with 2.
    """

    help: str
    example: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]
