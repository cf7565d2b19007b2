"""Commands whose input rows name an image and a text (pairs to score, questions to answer): files of such
rows, and results as JSON Lines, which a later run can resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from blip_fast.command_line.jsonl import JsonLines, json_object
from blip_fast.command_line.model_options import settle_output
from blip_fast.command_line.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS = 512  # rows of one image that are processed and written together

Row = dict[str, Any]
# (pixels [images, 3, size, size], each image's texts) → fields to add to each row, image after image
Work = Callable[["Tensor", list[list[str]]], Iterable[Row]]


def read_rows(path: str, text: str) -> list[Row]:
    """Rows of a `.jsonl` file (objects with `image` and the key that `text` names; other keys are kept) or of
    a `.tsv` file (image, tab, text). Image paths are used as they are.

    Raises ValueError naming the first line that is neither, or if there is no line.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".jsonl", ".tsv"):
        raise ValueError(f'{path} must be a .jsonl file with "image" and "{text}" in every line, or a '
                         '.tsv of both')
    read = _json_row if kind == ".jsonl" else _tsv_row
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [read(line, text, f"{path}, line {number}") for number, line in enumerate(lines, 1)
            if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no line")
    return rows


def _json_row(line: str, text: str, where: str) -> Row:
    row = json_object(line)
    if row is None:
        raise ValueError(f"{where} is no JSON object")
    for key in ("image", text):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'{where} has no "{key}": every row needs "image" and "{text}"')
    return row


def _tsv_row(line: str, text: str, where: str) -> Row:
    image, tab, said = line.rstrip("\r").partition("\t")
    if not (image.strip() and tab and said.strip()):
        raise ValueError(f"{where} is not an image, a tab and a {text}")
    return {"image": image, text: said}


def run_rows(args: Namespace, rows: Sequence[Row], text: str,
             make_work: Callable[[], tuple[Work, int]]) -> int:
    """Process all rows and write them in order, with results, to the file `--output` or to standard output.

    Consecutive rows of the same image are processed together. A row whose image cannot be read gets an
    `error` instead of results, and the run goes on.

    Args:
        args: with the options of `add_model_options`, and `batch_size` (images per batch), `output` and
            `resume` (skip rows that the file already holds).
        text: the key of each row's text.
        make_work: loads the model (in the precision of `args.dtype`, which is resolved before), and returns
            the work function and the image size that it takes.

    Returns:
        The exit status: 1 if an image could not be read.

    Raises:
        ValueError: `resume` without `output`; `batch_size` is less than 1; the file's rows have another
            precision.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.output is None:
        if args.resume:
            raise ValueError("--resume needs --output FILE.jsonl, the file to go on with")
        return _run(args, rows, text, make_work, None)
    with closing(JsonLines(args.output, args.resume, text)) as file:
        left = [row for row in rows if not file.done.take(row["image"], row[text])]
        return _run(args, left, text, make_work, file)


def _run(args: Namespace, rows: Sequence[Row], text: str, make_work: Callable[[], tuple[Work, int]],
         file: JsonLines | None) -> int:
    from blip_fast.inference.precision import say

    if not rows:
        print("blip-fast: nothing left to do", file=sys.stderr)
        return 0
    line, write = settle_output(args, file), _print if file is None else file.write
    work, image_size = make_work()
    say(line)
    failed: set[str] = set()
    with progress_bar("rows", "rows", lambda: len(rows)) as advance:
        for row in _results(rows, text, work, image_size, args.batch_size):
            write(row)
            advance()
            if "error" in row and row["image"] not in failed:
                failed.add(row["image"])
                print(f"blip-fast: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _print(row: Row) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def _results(rows: Sequence[Row], text: str, work: Work, image_size: int, batch_size: int) -> Iterator[Row]:
    import torch

    from blip_fast.media.images import ImageError
    from blip_fast.tasks.model_loading import read_pixels

    groups = [list(part) for _, same in groupby(rows, lambda row: row["image"])
              for part in iter(partial(_take, same, MOST_ROWS), [])]
    pixels = read_pixels((group[0]["image"] for group in groups), image_size)
    groups_with_pixels = zip(groups, pixels, strict=True)
    while batch := list(islice(groups_with_pixels, batch_size)):
        readable = [(group, read) for group, read in batch if not isinstance(read, ImageError)]
        found = iter(work(torch.stack([read for _, read in readable]),
                          [[row[text] for row in group] for group, _ in readable]) if readable else ())
        for group, read in batch:
            for row in group:
                yield row | ({"error": str(read)} if isinstance(read, ImageError) else next(found))


def _take(rows: Iterator[Row], count: int) -> list[Row]:
    return list(islice(rows, count))
