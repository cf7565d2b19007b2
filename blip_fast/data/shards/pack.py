"""Pack a folder of photographs and their captions into shards, checking every image with the decoder that
will read it.

A file that training could not decode does not end the run: it is left out and named, with the reason, in
`quarantine.jsonl`. JPEG, PNG and WebP are stored unchanged; formats that only Pillow reads (GIF, TIFF, AVIF,
…) are stored as PNG.
"""

# nvimgcodec is a binary module without stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from nvidia import nvimgcodec
from rich.console import Console
from rich.progress import track

from blip_fast.data.shards.annotated import AnnotationFile
from blip_fast.data.shards.integrity import image_format, what_is_wrong
from blip_fast.data.shards.shards import Sample, claim, write_shards
from blip_fast.media.images import SUFFIXES, ImageError, load_image

QUARANTINE = "quarantine.jsonl"
READ_AHEAD = 32  # samples in memory per thread

_decoders = threading.local()  # a decoder serves one thread at a time


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote: `samples` in `shards` tar files, some of them without a caption; `quarantined`
    samples are left out."""

    samples: int
    without_caption: int
    shards: int
    quarantined: int
    directory: Path


def pack(
    folder: str | Path,
    annotations: str | Path | None,
    directory: str | Path,
    *,
    split: str | None = None,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    threads: int | None = None,
) -> PackReport:
    """Write shards into `directory`. The same input gives the same bytes.

    `annotations` is an `AnnotationFile` whose images are paths below `folder`. All rows of an image form one
    sample, except that each question, pair of images and dialogue is a sample of its own. Only the places of
    rows are in memory for all samples. Without annotations, every image below `folder` is packed, without
    captions. `split` selects the rows of that split. Training shuffles only within a buffer: give a
    `shuffle_seed` if neighbouring rows are alike.

    Raises FileNotFoundError or ValueError for invalid input, before any work; FileExistsError if `directory`
    already holds shards; ValueError if no image can be read.
    """
    folder = Path(folder)
    records, row = _records(folder, annotations, split)
    if shuffle_seed is not None:
        records = [records[i] for i in np.random.default_rng(shuffle_seed).permutation(len(records))]
    directory = claim(directory)
    quarantine = directory / QUARANTINE
    with quarantine.open("w", encoding="utf-8") as refused:
        read = (_merge_rows(record, row) for record in records)
        samples = _good_samples(folder, read, len(records), refused, threads or os.cpu_count() or 1)
        first = next(samples, None)
        if first is None:
            raise ValueError(f"none of {len(records)} images can be read: {quarantine} says why")
        index = write_shards(chain([first], samples), directory, samples_per_shard=samples_per_shard)
    left_out = len(records) - index.samples
    return PackReport(index.samples, index.without_caption, len(index.shards), left_out, directory)


def _good_samples(folder: Path, records: Iterator[dict[str, Any]], count: int, refused: TextIO,
                  threads: int) -> Iterator[Sample]:
    """The samples whose images can be read, in order. Each image that cannot is written to `refused` as a
    line."""
    hidden = not sys.stderr.isatty()
    with ThreadPoolExecutor(threads) as pool:
        left = track(records, "packing", total=count, console=Console(stderr=True), disable=hidden)
        while chunk := list(islice(left, READ_AHEAD * threads)):
            names = [[record[name] for name in ("image", "second_image") if name in record]
                     for record in chunk]
            contents = pool.map(_read, [folder / name for of_sample in names for name in of_sample])
            for record, of_sample in zip(chunk, names, strict=True):
                read = list(islice(contents, len(of_sample)))
                for name, content in zip(of_sample, read, strict=True):
                    if isinstance(content, ImageError):
                        line = {"image": name, "reason": str(content)}
                        refused.write(json.dumps(line, ensure_ascii=False) + "\n")
                whole = [content for content in read if not isinstance(content, ImageError)]
                if len(whole) == len(read):
                    yield Sample(record["key"], whole[0], record, *whole[1:])


def _read(path: Path) -> bytes | ImageError:
    """The file's image as returned by `checked`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return ImageError(f"cannot be read: {error.strerror}")
    return checked(content, path.name)


def checked(content: bytes, name: str) -> bytes | ImageError:
    """The encoded image as JPEG, PNG or WebP that training's decoder reads, or the reason why not."""
    if content and image_format(content) is None:
        try:
            stream = io.BytesIO()
            load_image(content, name=name).save(stream, "PNG")
            content = stream.getvalue()
        except ImageError as error:
            return error
    if reason := what_is_wrong(content):
        return ImageError(reason)
    if not hasattr(_decoders, "decoder"):
        _decoders.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
    if _decoders.decoder.decode(content) is None:
        return ImageError("damaged: the decoder refuses it")
    return content


def _records(folder: Path, annotations: str | Path | None,
             split: str | None) -> tuple[list[list[int]], Callable[[int], dict[str, Any]]]:
    """For each sample, in the order of the annotations, the number of its first row and the places of all of
    its rows; and a function that reads the row at a place."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of images")
    if annotations is None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        rows = [{"image": path.relative_to(folder).as_posix(), "captions": []} for path in found]
        placed, read = enumerate(rows), rows.__getitem__
    else:
        file = AnnotationFile(annotations)
        placed, read = file, file.row
    by_image: dict[str | int, list[int]] = {}
    for number, (place, row) in enumerate(placed):
        if split is not None and row.get("split") != split:
            continue
        own = any(key in row for key in ("question", "second_image", "dialog"))
        by_image.setdefault(number if own else row["image"], [number]).append(place)
    if not by_image:
        wanted = f" of split {split!r}" if split is not None else ""
        raise ValueError(f"{annotations or folder} names no image{wanted}: nothing to pack")
    return list(by_image.values()), read


def _merge_rows(record: list[int], row: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """A sample's record: key, image, captions of all of its rows, and the other fields of its first row."""
    number, *places = record
    rows = [row(place) for place in places]
    return {**rows[0], "key": f"{number:09d}",
            "captions": [caption for one in rows for caption in one["captions"]]}
