"""The commands of `blip-fast`, one file each.

A package adds a command by an entry point of the group `blip_fast.commands` (see pyproject.toml), which names a
`Command`. Command files import nothing heavy at the top: `blip-fast --help` must answer at once.
"""

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
