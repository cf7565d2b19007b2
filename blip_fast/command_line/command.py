"""What a command is to the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace


@dataclass(frozen=True)
class Command:
    """One command.

    `arguments` adds its options to a parser; `run` does the work and returns the exit status (None is 0). Bad input is
    a ValueError or OSError with one clear sentence: the command line prints it and exits with 2.
    """

    help: str
    example: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]
