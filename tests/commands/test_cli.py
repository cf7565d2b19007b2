"""The command line itself: what it does for every command."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from blip_fast import cli
from blip_fast.command_line.command import Command

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
COMMANDS = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][cli.GROUP]


def fake_command(monkeypatch, run) -> None:
    """`blip-fast fake --number N` instead of the installed commands; `run` takes its arguments."""
    command = Command("a test", "blip-fast fake", lambda parser: parser.add_argument("--number", type=int),
                      run)
    monkeypatch.setattr(EntryPoint, "load", lambda entry: command)
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("fake", "fake:COMMAND", group)])


def failing(error: BaseException):
    def run(args):
        raise error
    return run


def only_line(capsys) -> str:
    """The only line that was printed; it must be on the error stream."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("blip-fast: ")
    return line


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = ("import sys; from blip_fast.cli import main; assert main(['--help']) == 0\n"
            "print(*{'torch', 'nvidia', 'deepspeed', 'transformers'} & sys.modules.keys(), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert listed == set(COMMANDS)
    assert done.stderr.split() == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_commands_help_ends_with_an_example_of_it(name, capsys):
    (entry,) = entry_points(group=cli.GROUP, name=name)
    assert f"{entry.load().example} ".startswith(f"blip-fast {name} ")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: blip-fast {name} ") and said.endswith(f"example: {entry.load().example}")


def test_without_a_command_the_overview_is_printed(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: blip-fast COMMAND")


def test_unknown_commands_and_options_are_one_line(monkeypatch, capsys):
    fake_command(monkeypatch, lambda args: None)
    assert cli.main(["fakes"]) == 2
    assert only_line(capsys) == "blip-fast: 'fakes' is not a command: choose one of fake"
    assert cli.main(["fake", "--colour", "red"]) == 2
    assert "--colour" in only_line(capsys)
    assert cli.main(["fake", "--number", "red"]) == 2
    assert '"number"' in only_line(capsys)


@pytest.mark.parametrize(("error", "status", "said"), [
    (ValueError("two lines\n  of it"), 2, "two lines of it"),
    (FileNotFoundError(2, "No such file or directory", "a.jpg"), 2, "No such file or directory: 'a.jpg'"),
    (ModuleNotFoundError("No module named 'ray'", name="ray"), 2, "the package ray, which is not installed"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_stops_a_command_is_one_line(error, status, said, monkeypatch, capsys):
    fake_command(monkeypatch, failing(error))
    assert cli.main(["fake"]) == status
    assert said in only_line(capsys)


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch):
    fake_command(monkeypatch, failing(KeyError("x")))
    with pytest.raises(KeyError):
        cli.main(["fake"])


def test_statuses_and_arguments_pass_through(monkeypatch):
    seen = []
    fake_command(monkeypatch, lambda args: seen.append(args.number) or 3)
    assert cli.main(["fake", "--number", "5"]) == 3
    fake_command(monkeypatch, lambda args: None)
    assert cli.main(["fake"]) == 0
    assert seen == [5]


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"]])
def test_a_reader_that_went_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "blip_fast", *arguments], stdout=write,
                          stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
