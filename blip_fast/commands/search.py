"""`blip-fast search`: index images, and find them by text or by image."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import add_model_options, model_options, settle_precision

if TYPE_CHECKING:
    from blip_fast.search import AddReport, Hit, Index


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(dest="action", metavar="ACTION")
    for name, add, help, example in (
        ("index", _index_arguments, "index images, or bring an index up to date",
         "blip-fast search index --model Salesforce/blip-itm-base-coco --index photos.index photos/"),
        ("query", _query_arguments, "find images by text or by image",
         'blip-fast search query --index photos.index --text "a dog on grass" --html found.html'),
    ):
        action = ArgumentParser(description=help, epilog=f"example: {example}", exit_on_error=False)
        action.add_argument("--index", required=True, metavar="DIR", help="directory of the index")
        add(action)
        actions.add_subcommand(name, action, help=help)


def _index_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE",
        help="image files, folders of images, webdataset shards (.tar); those "
        "that the index holds and that have not changed are left alone")
    add_model_options(parser, required=False)
    add("--storage", type=str | None, help="of a new index: float32 (default), or float16 in half the space")
    add("--prune", action="store_true",
        help="forget indexed images whose files are gone, and free their room")
    add("--json", action="store_true", help="print what was done as one JSON object")


def _query_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=str | None, help="find images that fit this text")
    add("--image", type=str | None, metavar="FILE", help="find images that look like this one")
    add("--top", type=int, default=20, metavar="N", help="images wanted")
    add("--rerank", type=int, default=64, metavar="N",
        help="with --text: the matching head looks at so many of the best; 0 for cosines alone")
    add("--first-token", default="[ENC]",
        help="what the text starts with before the matching head: [ENC] as in training, [CLS] as in "
             "transformers")
    add("--backend", default="exact",
        help="exact, or with a graph that finds most of the same sooner: faiss or usearch, where installed")
    add("--model", type=str | None, metavar="DIR_OR_ID",
        help="where the index's model is now, if it was moved")
    add("--device", type=str | None, help="cpu or cuda (default: cuda where there is one)")
    add("--threads", type=int | None, help="threads that a product on a CPU is shared by")
    add("--json", action="store_true",
        help="print JSON lines: image, score, itc, itm (null where not re-ranked)")
    add("--html", type=str | None, metavar="PAGE.html", help="write a contact sheet")


def _run(args: Namespace) -> int:
    return _index(args.index) if args.action == "index" else _query(args.query)


def _index(args: Namespace) -> int:
    from blip_fast.inference.precision import say
    from blip_fast.search import AddReport
    from blip_fast.search.store import BROKEN

    found, line = _open_or_create(args)
    with closing(found) as index:
        with _progress() as progress:
            report = index.add(args.images, progress=progress) if args.images else AddReport()
        if args.images:
            say(line)
        pruned = index.prune() if args.prune else 0
        missing = sum(1 for _ in index.missing())
        if args.json:
            print(json.dumps({"images": len(index), **asdict(report), "missing": missing, "pruned": pruned}))
        else:
            print(f"{args.index}: {len(index):,} images, {report.added:,} of them new, "
                  f"{report.changed:,} changed, {report.unchanged:,} of those named as they were"
                  + (f", {pruned:,} dropped" if pruned else ""))
        if missing:
            print(f"blip-fast: {missing:,} indexed images are not where they were: forget them with --prune",
                  file=sys.stderr)
        if report.broken:
            print(f"blip-fast: {report.broken:,} images could not be read: {Path(args.index, BROKEN)}",
                  file=sys.stderr)
    return 1 if report.broken else 0


def _open_or_create(args: Namespace) -> tuple[Index, str]:
    """The index in the directory, or a new one, and the line about its precision."""
    from blip_fast.search import Index
    from blip_fast.search.store import DATABASE

    if not (Path(args.index) / DATABASE).exists():
        if args.model is None:
            raise ValueError(f"{args.index} holds no index yet: name the model to make one with (--model)")
        line = settle_precision(args)
        return Index.create(args.index, args.model, storage=args.storage or "float32",
                            **model_options(args)), line
    index = Index.open(args.index, model=args.model, device=args.device, threads=args.threads)
    asked = {**model_options(args), "dtype": None if args.dtype == "auto" else args.dtype,
             "storage": args.storage}
    for name, value in index.options.items():
        if asked[name] not in (None, value):
            raise ValueError(f"the index {args.index} has {name} {value}, not {asked[name]}: leave that "
                             "option out, or index into another directory")
    return index, settle_precision(args, str(index.options["dtype"]))


def _query(args: Namespace) -> int:
    from blip_fast.inference.precision import say
    from blip_fast.search import Index

    with closing(Index.open(args.index, model=args.model, device=args.device, threads=args.threads)) as index:
        line = settle_precision(Namespace(dtype=index.options["dtype"], device=args.device))
        hits = index.query(args.text, args.image, top=args.top, rerank=args.rerank,
                           first_token=args.first_token, backend=args.backend)
        say(line)
        if args.html is not None:  # before printing, which fails if the reader of the output goes away
            from blip_fast.search.sheet import contact_sheet

            contact_sheet(index, hits, args.text, args.image).write(args.html)
        for rank, hit in enumerate(hits, 1):
            print(json.dumps(_row(hit)) if args.json else _line(rank, hit))
        if not hits:
            print(f"blip-fast: {args.index} holds no images", file=sys.stderr)
        for hit in hits:
            if hit.error is not None:
                print(f"blip-fast: not re-ranked: {hit.error}", file=sys.stderr)
    return 0


def _row(hit: Hit) -> dict[str, Any]:
    """A hit as JSON, to be printed in ASCII, so that file names that are not valid text keep their bytes."""
    return {"image": hit.image.name, "score": hit.score, "itc": hit.itc, "itm": hit.itm}


def _line(rank: int, hit: Hit) -> str:
    from blip_fast.search.store import printable

    itm = "        –" if hit.itm is None else f"itm {hit.itm:.3f}"
    return f"{rank:4}  {hit.score:+8.3f}  {itm}  itc {hit.itc:+.4f}  {printable(hit.image.name)}"


@contextmanager
def _progress() -> Iterator[Callable[[AddReport], None] | None]:
    """A progress line with counts and images per second, if the error stream is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("indexing")

        def show(report: AddReport) -> None:
            done = report.images - report.unchanged
            rate = done / max(bar.tasks[0].elapsed or 0.0, 1e-3)
            bar.update(task, description=f"{done:,} images encoded, {report.unchanged:,} unchanged, "
                                         f"{report.broken:,} broken, {rate:.1f} images/s")
        yield show


COMMAND = Command(
    help="index images, and find them by text or by image",
    example='blip-fast search query --index photos.index --text "a dog on grass" --html found.html',
    arguments=_arguments,
    run=_run,
)
