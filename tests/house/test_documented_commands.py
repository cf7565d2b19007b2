"""The command line accepts every `blip-fast` line in the documents' code blocks."""

import dataclasses
import re
import shlex
from argparse import ArgumentError
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from blip_fast import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in (
    "captioning", "scoring-and-search", "capfilt", "training", "evaluation", "serving", "results")))


def documented(name: str) -> list[str]:
    """The lines in a document's code blocks that call `blip-fast`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"),
                        re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("blip-fast ")]


def parse(line: str) -> None:
    """Parse a command line without running it. Raises the error that the command line would print."""
    name, *arguments = shlex.split(line)[1:]
    (entry,) = entry_points(group=cli.GROUP, name=name)
    cli._run(name, dataclasses.replace(entry.load(), run=lambda args: None), arguments)


@pytest.mark.parametrize("line", [line for name in DOCUMENTS for line in documented(name)])
def test_a_documented_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes' paths are relative to it
    parse(line)


def test_every_document_has_commands_and_a_wrong_one_is_noticed():
    assert all(documented(name) for name in DOCUMENTS)
    with pytest.raises(ArgumentError, match="--colour"):
        parse("blip-fast evaluate retrieval --model m --data d --colour red")
    with pytest.raises(ArgumentError, match="data"):
        parse("blip-fast evaluate retrieval --model m")
