"""Every `blip-fast` line of a documented block is one that the command line takes."""

import dataclasses
import re
import shlex
from argparse import ArgumentError
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from blip_fast import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/results.md")


def documented(name: str) -> list[str]:
    """The lines within the document's blocks of code that call `blip-fast`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("blip-fast ")]


def parse(line: str) -> None:
    """Raises what the command line would say of the arguments; runs nothing."""
    name, *arguments = shlex.split(line)[1:]
    (entry,) = entry_points(group=cli.GROUP, name=name)
    cli._run(name, dataclasses.replace(entry.load(), run=lambda args: None), arguments)


@pytest.mark.parametrize("line", [line for name in DOCUMENTS for line in documented(name)])
def test_a_documented_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from there
    parse(line)


def test_every_document_has_commands_and_a_wrong_one_is_noticed():
    assert all(len(documented(name)) > 10 for name in DOCUMENTS)
    with pytest.raises(ArgumentError, match="--colour"):
        parse("blip-fast evaluate retrieval --model m --data d --colour red")
    with pytest.raises(ArgumentError, match="data"):
        parse("blip-fast evaluate retrieval --model m")
