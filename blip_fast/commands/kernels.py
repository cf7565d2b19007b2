"""`blip-fast kernels`: compile all GPU kernels ahead of time, without a GPU, and report; or tune on a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object per kernel, target and dtype")
    parser.add_argument("--target", default="sm_80,sm_90,sm_100", help="GPU generations: A100, H100, B200")
    parser.add_argument("--dtype", default="float16,bfloat16", help="dtypes of the inputs; float32 works too")
    parser.add_argument("--op", help="ops, all unless given: attention,contrastive")
    parser.add_argument("--launch", default="*", help="only launches whose name matches: '*head_dim 64*'")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes that compile")
    parser.add_argument("--write-budgets", action="store_true",
                        help="make what the kernels use now their budgets, in gpu/budgets.json of this "
                             "installation")
    parser.add_argument("--tune", action="store_true",
                        help="instead, measure launch configurations on the GPU at hand")
    parser.add_argument("--output", default="kernel-configs.json",
                        help="where --tune writes the best; BLIP_FAST_KERNEL_CONFIGS may name it")


def _run(args: Namespace) -> int:
    if find_spec("triton") is None:
        raise ModuleNotFoundError(name="triton")
    chosen = {"op": _parse_list("op", args.op), "dtype": _parse_list("dtype", args.dtype)}
    if args.tune:
        return _python("blip_kernels.compiled.tune", [*_options(chosen), "--output", args.output]).wait()
    if args.write_budgets and (args.launch, args.dtype) != ("*", "float16,bfloat16"):
        raise ValueError("--write-budgets measures all launches in float16 and bfloat16: drop --launch "
                         "and --dtype")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}: at least 1")
    chosen["target"] = _parse_list("target", args.target)
    options = [*_options(chosen), "--launch", args.launch, "--jobs", str(args.jobs), "--json"]
    status, rows = _rows(_python("blip_kernels.compiled.aot", options), args.json)
    if status:  # the process has printed why
        return status
    if args.write_budgets:
        from blip_kernels.compiled import aot, budgets

        budgets.write(aot.KernelReport(**row) for row in rows)
    if not args.json:
        _print(rows)
    return 0


def _parse_list(name: str, given: str | None) -> list[str]:
    """The comma-separated values of an option. Raises ValueError for an unknown one."""
    from blip_kernels.compiled.aot import DTYPES, OPS, TARGETS

    known = {"op": OPS, "dtype": DTYPES, "target": TARGETS}[name]
    found = [part.strip() for part in given.split(",")] if given is not None else []
    for part in found:
        if part not in known:
            raise ValueError(f"--{name}: {part!r} is not known, choose from {', '.join(known)}")
    return found


def _options(chosen: dict[str, list[str]]) -> list[str]:
    return [word for name, parts in chosen.items() for part in parts for word in (f"--{name}", part)]


def _python(module: str, options: list[str]) -> subprocess.Popen[str]:
    """Run a module in a new process: Triton decides at import whether it compiles or interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _rows(process: subprocess.Popen[str], print_them: bool) -> tuple[int, list[dict[str, Any]]]:
    """The process's exit status and its reports."""
    from rich.console import Console

    rows = []
    with process, Console(stderr=True).status("compiling") as status:
        try:
            for line in process.stdout or ():
                rows.append(json.loads(line))
                if print_them:
                    print(line, end="", flush=True)
                status.update(f"compiling: {len(rows)} kernels, last {rows[-1]['op']} for "
                              f"{rows[-1]['target']}")
        except BaseException:
            process.send_signal(signal.SIGINT)
            raise
    return process.returncode, rows


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for op in dict.fromkeys(row["op"] for row in rows):
        table = Table("kernel", "for", "registers", "spilled", "shared", "MMA", "in loop",
                      "per MMA", "occupancy", "ceiling", title=op, title_style="bold", box=SIMPLE_HEAD)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in _distinct([row for row in rows if row["op"] == op]):
            name = Text.assemble(row["kernel"].strip("_").removesuffix("_kernel"),
                                 (f"\n{row['launch']}", "dim"))
            table.add_row(name, f"{row['target']}\n{row['dtype']}", *_figures(row))
        console.print(table)
    console.print(f"[dim]{_legend(rows)}[/dim]")


def _distinct(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows without those that differ from an earlier one only in their launch."""
    seen = set()
    for row in rows:
        key = json.dumps(row | {"launch": ""})
        if key not in seen:
            seen.add(key)
            yield row


def _figures(row: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    spilled = Text(f"{row['spill_bytes']} B", "bold red" if row["spill_bytes"] else "")
    ceiling = "–" if row["ceiling"] is None else f"{row['ceiling']:.0%} {row['limit']}"
    return [str(row["registers"]), spilled, f"{row['shared_bytes'] / 1024:.0f} KiB",
            str(row["tensor_core_instructions"]), number(row["loop_instructions"], "d"),
            number(row["instructions_per_mma"], ".2f"), f"{row['occupancy']:.0%}", ceiling]


def _legend(rows: list[dict[str, Any]]) -> str:
    assemblers = ", ".join(f"{target} {version}" for target, version in
                           dict.fromkeys((row["target"], row["ptxas"]) for row in rows))
    return ("per MMA: instructions that a warp issues in the main loop per 4,096 MMA FLOPs that it "
            "owns. ceiling: bound on the share of the tensor cores' peak, and what sets it. ptxas: "
            f"{assemblers}")


COMMAND = Command(
    help="compile the GPU kernels for A100, H100 and B200 with no GPU, and count; --tune measures on a GPU",
    example="blip-fast kernels --op attention --target sm_90 --launch '*head_dim 64'",
    arguments=_arguments,
    run=_run,
)
