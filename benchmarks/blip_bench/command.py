"""`blip-fast bench`: how fast this machine captions, re-ranks, answers and encodes, compared with other
implementations in the same run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command

if TYPE_CHECKING:
    from rich.table import Table

    from blip_bench.timing import Case

TASKS = ("caption", "encode", "rerank", "vqa")


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("task", choices=TASKS, help="what to measure")
    add("--model", type=str | None, metavar="DIR_OR_ID",
        help="checkpoint to take the weights of (default: random ones of the base size, the same every time)")
    add("--image-size", type=int, default=384, help="pixels a side; position embeddings are resized to it")
    add("--images", type=int | None,
        help="pictures in a call (default: 4; for caption 16, the captioner's own batch; for vqa 8 "
             "with a question each); rerank always has 64 and 320 captions")
    add("--rounds", type=int, default=3, help="how often everyone has a turn")
    add("--full", action="store_true", help="rerank: all of the work instead of a kth; takes many minutes")
    add("--dtypes", type=str | None, metavar="DTYPE,...",
        help="float32, bfloat16, and for caption and encode int8 (default: those that this processor "
             "multiplies in hardware; for rerank, which takes minutes, the last of them)")
    add("--peers", type=str | None, metavar="PEER,...",
        help="caption, encode: who is measured as well: openvino, onnxruntime, compiled "
             "(PyTorch's compiler), transformers (default: all that are installed; pip install "
             "'blip-fast[peers]')")
    add("--threads", type=int | None, help="threads of everyone (default: as PyTorch chooses)")
    add("--json", action="store_true", help="print one JSON object")


def _run(args: Namespace) -> int:
    for name in ("image_size", "images", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: at least 1")
    if args.task == "rerank" and args.images is not None:
        raise ValueError("--images is for caption, encode and vqa: rerank has 64 and 320 captions")
    if args.full and args.task != "rerank":
        raise ValueError(f"--full is for rerank: give {args.task} more --images or --rounds")
    import torch
    from rich.console import Console

    from blip_bench.machine import machine
    from blip_bench.peers.installed import chosen, version
    from blip_bench.sides import dtypes_for
    from blip_bench.timing import Disagreement, measure

    dtypes, peers = dtypes_for(args.task, args.dtypes), chosen(args.task, args.peers)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"task": args.task, "model": args.model or "base, random weights",
                             "image_size": args.image_size, "rounds": args.rounds, "machine": machine(),
                             "peers": {peer: version(peer) for peer, reason in peers.items()
                                       if reason is None},
                             "missing": {peer: reason for peer, reason in peers.items() if reason},
                             "cases": []}
    console = Console(stderr=True)
    with TemporaryDirectory() as directory, console.status("making the models"):
        try:
            for case in _cases(args, dtypes, found["peers"], Path(directory)):
                with console.status(f"{args.task}, {case.name}: {args.rounds} rounds of "
                                    f"{', '.join(case.calls)}"):
                    found["cases"].append(measure(case, args.rounds))
        except Disagreement as error:
            console.print(f"blip-fast: {error}", soft_wrap=True)
            return 1
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print(found)
    return 0


def _cases(args: Namespace, dtypes: Sequence[str], peers: Collection[str], directory: Path) -> Iterator[Case]:
    from blip_bench import models

    part = {"caption": "caption", "rerank": "match", "vqa": "answer"}.get(args.task)
    models.write_checkpoint(directory, part or models.part_for_encoding(args.model),
                            args.image_size, args.model)
    if args.task == "caption":
        from blip_bench.cases import caption
        from blip_fast.tasks.captioner import BATCH

        return caption.cases(directory, args.images or BATCH, dtypes, peers)
    if args.task == "encode":
        from blip_bench.cases import encode

        return encode.cases(directory, args.images or 4, dtypes, peers)
    if args.task == "rerank":
        from blip_bench.cases import rerank

        return chain.from_iterable(rerank.cases(directory, dtype, args.full) for dtype in dtypes)
    from blip_bench.cases import vqa

    return vqa.cases(directory, args.images or 8, dtypes)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console, about = Console(), found["machine"]
    console.print(f"[bold]{found['task']}[/bold]: {found['model']}, {found['image_size']} px, "
                  f"{found['rounds']} rounds")
    console.print(f"{about['cpu']}, {about['instructions']}, {about['threads']} threads, torch "
                  f"{about['torch']}")
    for case in found["cases"]:
        console.print(*_tables(case), sep="")
        if agreement := "; ".join(f"{name} {value:.3g}" for name, value in case["agreement"].items()):
            console.print(f"[dim]{agreement}[/dim]")
    for name, why in found["missing"].items():
        console.print(f"{name}: {why}")


def _tables(case: dict[str, Any]) -> list[Table]:
    """A table of seconds, and one of ratios if there are any."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    flops = any("tflops" in each for each in case["implementations"].values())
    times = Table(f"{case['case']}, {case['amount']} {case['unit']}", "seconds", f"{case['unit']} / s",
                  *(["TFLOP/s"] if flops else []), box=SIMPLE_HEAD)
    for name, each in case["implementations"].items():
        times.add_row(name, _spread(each["seconds"]), f"{each['per_second']:.3g}",
                      *([f"{each['tflops']:.3g}"] if flops else []))
    ratios = Table("how many times as fast", "", "target", box=SIMPLE_HEAD)
    for ratio in case["ratios"]:
        target = Text("")
        if "target" in ratio:
            target = Text(f"{ratio['target']} {'✓' if ratio['met'] else '✗'}",
                          "green" if ratio["met"] else "red")
        of, beside = (who if who.startswith(name) else f"{name} ({who})"
                      for name, who in zip((ratio["of"], ratio["beside"]), ratio["fastest"], strict=True))
        ratios.add_row(f"{of} as {beside}", _spread(ratio), target)
    for column in (*times.columns[1:], *ratios.columns[1:]):
        column.justify = "right"
    return [times, ratios] if case["ratios"] else [times]


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['lowest']:.3g}–{spread['highest']:.3g})"


COMMAND = Command(
    help="measure captioning, encoding, re-ranking or VQA next to other implementations",
    example="blip-fast bench caption --images 4 --rounds 5 --json",
    arguments=_arguments,
    run=_run,
)
