"""Commands that write a row for each image (captions, labels): the options that name images, and rows that
are printed or written to a JSON Lines file, which a later run can resume."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.sharing import add_sharing_options

if TYPE_CHECKING:
    from blip_fast.command_line.jsonl import DoneRows, JsonLines
    from blip_fast.data.shards.named_images import Share
    from blip_fast.data.shards.shards import Shard
    from blip_fast.media.images import StoredImage

Row = dict[str, Any]
Work = tuple["StoredImage", str | None]  # an image and its own prompt
# Makes rows with `image`, `prompt` (if the image has its own) and `error` (if it failed).
Worker = Callable[[Iterable[Work]], Generator[Row]]

RAY_BATCHES = 8  # batches of images per task of a cluster worker
MAX_REASONS = 20  # kinds of errors that are counted separately


def add_image_options(parser: ArgumentParser, listed: str = "one a line") -> None:
    """Add the options that `run_images` reads. `listed` describes a line of `--list`'s file."""
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE",
        help="image files, folders, quoted patterns ('photos/**/*.jpg'), webdataset shards (.tar), or "
             "URLs of shards that `blip-fast data pack` wrote (s3://bucket/shards)")
    add("--list", type=str | None, metavar="FILE",
        help=f"also the images named in FILE (- is standard input), {listed}")
    add("--batch-size", type=int, default=16, help="images at a time")
    add("--output", type=str | None, metavar="FILE.jsonl", help="write JSON lines here instead of printing")
    add("--resume", action="store_true",
        help="with --output: go on with the file, leave out images that it holds")
    add_sharing_options(parser, "for N machines that see the same files: images are dealt one by one, tars "
                                "under URLs whole", "images")


def run_images(args: Namespace, make_worker: Callable[[], Worker],
               lines: Callable[[Row], Iterable[str]]) -> int:
    """Process all images that the arguments name, and write or print their rows.

    An image that cannot be read does not end the run, unless it is the only one.

    Args:
        args: with the options of `add_image_options` and `add_model_options`, and `json`: print rows as JSON
            rather than as text.
        make_worker: loads the model (in the precision of `args.dtype`, which is resolved before) and returns
            the function that makes rows of images, in order. With Ray it is pickled.
        lines: the lines of text to print for a row without an error.

    Returns:
        The exit status: 1 if a row has an error.

    Raises:
        ValueError: no image is named; options that do not fit.
    """
    from blip_fast.command_line.jsonl import JsonLines
    from blip_fast.data.shards.named_images import Share
    from blip_fast.parallel.signals import sigterm_interrupts

    share = Share.parse(args.shard)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not args.images and args.list is None:
        raise ValueError("no image is named: name files, folders or shards, or a list of them (--list FILE)")
    if args.resume and args.output is None:
        raise ValueError("--resume needs --output FILE.jsonl, the file to go on with")
    with (sigterm_interrupts(), nullcontext() if args.output is None else
          closing(JsonLines(args.output, args.resume)) as output):
        return _run_all(args, make_worker, share, _Report(args.json, output, lines))


def named(image: str, prompt: str | None) -> Row:
    """The first fields of a row, by which a resumed run recognises it."""
    return {"image": image} | ({} if prompt is None else {"prompt": prompt})


def _run_all(args: Namespace, make_worker: Callable[[], Worker], share: Share, report: _Report) -> int:
    from blip_fast.command_line.model_options import settle_output
    from blip_fast.command_line.progress import progress_bar
    from blip_fast.inference.precision import say
    from blip_fast.parallel.signals import exit_status

    output = report.output
    work = _remaining_work(args, share, output)
    first = list(islice(work, 2))
    if not first:
        print("blip-fast: nothing left to do", file=sys.stderr)
        return 0
    if len(first) == 1 and output is None:
        first[0][0].load()
    line = settle_output(args, output)
    hidden = output is None and sys.stdout.isatty()
    try:
        with progress_bar("images", "img", partial(_count, args, share, output), hidden) as advance, \
                closing(_rows(args, make_worker, chain(first, work))) as rows:
            for row in rows:
                if not report.rows:  # not before: if the input is refused, that is the only line printed
                    say(line)
                report.add(row)
                advance()
    except KeyboardInterrupt as stop:
        where = ("" if output is None else
                 f"; {output.path} is whole: the same command with --resume goes on with it")
        print(f"blip-fast: interrupted after {report.rows:,} images{where}", file=sys.stderr)
        return exit_status(stop)
    finally:
        report.print_errors()
    return 1 if report.reasons else 0


def _work(args: Namespace, share: Share, is_done: Callable[[str, Shard], bool]) -> Iterator[Work]:
    """All images that the arguments name, in order."""
    from blip_fast.data.shards.named_images import expand, listed, open_list
    from blip_fast.data.shards.shard_cache import shard_cache

    images = expand(args.images, shard_cache(args.cache, args.cache_gb), share, is_done)
    entries = listed(open_list(args.list), share) if args.list else ()
    if "prompt" not in args:  # the command has no prompts, so ignore images' own
        entries = ((image, None) for image, _ in entries)
    return chain(((image, None) for image in images), entries)


def _remaining_work(args: Namespace, share: Share, output: JsonLines | None) -> Iterator[Work]:
    """The images that have no row yet."""
    if output is None:
        return _work(args, share, lambda url, shard: False)
    done: DoneRows = output.done
    work = _work(args, share, lambda url, shard: done.in_tars[url] >= shard.samples)
    return ((image, prompt) for image, prompt in work if not done.take(image.name, prompt))


def _count(args: Namespace, share: Share, output: JsonLines | None) -> int | None:
    """The number of remaining images, or None if it cannot be known in advance."""
    if args.list == "-":
        return None
    in_tars = 0

    def count_and_skip(url: str, shard: Shard) -> bool:
        nonlocal in_tars
        in_tars += shard.samples
        return True

    files = sum(1 for _ in _work(args, share, count_and_skip))
    return files + in_tars - (0 if output is None else output.done.count)


def _rows(args: Namespace, make_worker: Callable[[], Worker], work: Iterable[Work]) -> Generator[Row]:
    """Rows made by this process, or by the workers of a Ray cluster."""
    if args.ray is None:
        return make_worker()(work)
    from blip_fast.parallel.ray_cluster import on_ray

    work = iter(work)
    batches = iter(lambda: list(islice(work, RAY_BATCHES * args.batch_size)), [])
    return on_ray(args.ray or None, batches, make_worker, gpus=args.device != "cpu")


class _Report:
    """Writes or prints rows, and counts the errors by reason."""

    def __init__(self, as_json: bool, output: JsonLines | None,
                 lines: Callable[[Row], Iterable[str]]) -> None:
        self.rows, self.reasons, self.output = 0, Counter[str](), output
        self._as_json, self._lines = as_json, lines

    def add(self, row: Row) -> None:
        if self.output is not None:
            self.output.write(row)
        elif self._as_json:
            print(_printable(json.dumps(row, ensure_ascii=False)), flush=True)
        elif "error" not in row:
            for line in self._lines(row):
                print(_printable(line), flush=True)
        self.rows += 1
        if "error" in row:
            if self.output is None:
                print(f"blip-fast: {_printable(row['error'])}", file=sys.stderr)
            reason = re.sub(r"\d[\d,.]*", "N", row["error"].removeprefix(f"{row['image']}: "))
            known = len(self.reasons) < MAX_REASONS or reason in self.reasons
            self.reasons[reason if known else "other reasons"] += 1

    def print_errors(self) -> None:
        if self.reasons:
            print(f"blip-fast: {self.reasons.total():,} of {self.rows:,} images have no result:",
                  file=sys.stderr)
        for reason, times in self.reasons.most_common():
            print(f"blip-fast: {times:,} × {reason}", file=sys.stderr)


def _printable(text: str) -> str:
    """Escape surrogates, which come from file names that are not UTF-8 and cannot be printed."""
    return text.encode("utf-8", "backslashreplace").decode()
