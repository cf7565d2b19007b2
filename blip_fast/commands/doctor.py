"""`blip-fast doctor`: what runs on this machine, and why other parts do not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command

if TYPE_CHECKING:
    from blip_fast.doctor import Diagnosis


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: Namespace) -> None:
    from rich.console import Console

    from blip_fast.doctor import diagnose

    with Console(stderr=True).status("looking at what is installed"):
        diagnosis = diagnose()
    if args.json:
        print(json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False))
    else:
        _print(diagnosis)


def _print(diagnosis: Diagnosis) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"[bold]{diagnosis.system}[/bold]")
    found = Table("", "What is here", "", box=SIMPLE_HEAD)
    for finding in diagnosis.findings:
        mark = Text("✓", "green") if finding.usable else Text("–", "yellow")
        name = Text.assemble((finding.name, "bold"), f" {finding.version or ''}\n", (finding.purpose, "dim"))
        found.add_row(mark, name, Text(finding.detail))
    parts = Table("Part", "Uses", "Why not the others", box=SIMPLE_HEAD)
    for part in diagnosis.parts:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in part.why_not.items())
        parts.add_row(part.name, Text(part.uses, "bold"), Text(reasons))
    console.print(found, parts, sep="")


COMMAND = Command(
    help="say what runs on this machine, and why not more",
    example="blip-fast doctor --json",
    arguments=_arguments,
    run=_run,
)
