"""Printing for commands that end with figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blip_fast.report.page import Metric


def print_figures(metrics: Sequence[Metric], seconds: float, page: Path) -> None:
    """Print shares with their targets, and chance levels if there are any; the time
    taken; and where the page is."""
    table = Table("figure", "value", "target", "chance")
    for metric in metrics:
        chance = "" if metric.chance is None else f"{metric.chance:.1%}"
        table.add_row(metric.name, f"{metric.value:.1%}", f"{metric.target:.0%}", chance)
    console = Console()
    console.print(table)
    console.print(f"{seconds:.0f} s in all; look at {page}")
