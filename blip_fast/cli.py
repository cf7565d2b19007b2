"""`blip-fast`: finds the commands of the installed packages and runs the one that is named."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from importlib.metadata import EntryPoint, entry_points

from jsonargparse import ArgumentParser

from blip_fast.command_line.command import Command

GROUP = "blip_fast.commands"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    try:
        try:
            return _dispatch(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, where a BrokenPipeError is still handled
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except BrokenPipeError:  # the reader of our output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        from blip_fast.doctor import remedy

        return _fail(f"this needs the package {error.name}, which is not installed: {remedy(error.name)}")
    except (ValueError, OSError, ArgumentError) as error:
        return _fail(" ".join(str(error).split()))


def _dispatch(arguments: list[str]) -> int:
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(commands))
        return 0 if arguments else 2
    name = arguments[0]
    if name not in commands:
        raise ValueError(f"{name!r} is not a command: choose one of {', '.join(sorted(commands))}")
    return _run(name, commands[name].load(), arguments[1:])


def _run(name: str, command: Command, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"blip-fast {name}", description=command.help,
                            epilog=f"example: {command.example}", exit_on_error=False)
    command.arguments(parser)
    return command.run(parser.parse_args(arguments)) or 0


def _overview(commands: dict[str, EntryPoint]) -> str:
    lines = ["usage: blip-fast COMMAND …    (blip-fast COMMAND --help explains one)", ""]
    lines += [f"  {name:<14} {commands[name].load().help}" for name in sorted(commands)]
    return "\n".join(lines)


def _fail(sentence: str, status: int = 2) -> int:
    print(f"blip-fast: {sentence}", file=sys.stderr)
    return status
