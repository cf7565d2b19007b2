"""Images with their captions, from a folder with `annotations.jsonl` or from packed shards. Images are
decoded only on request."""

from __future__ import annotations

import csv
import json
import tarfile
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blip_fast.data.shards.shards import INDEX, SECOND, read_index
from blip_fast.data.shards.tars import LocalTar
from blip_fast.media.images import StoredImage

ANNOTATIONS = "annotations.jsonl"


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage(StoredImage):
    """One image with its captions, its whole row or record, and the second image if it is a pair."""

    captions: list[str]
    row: dict[str, Any]
    second: StoredImage | None = None


def annotated_images(data: str | Path, split: str | None) -> list[AnnotatedImage]:
    """The images of a split, in order. A row without a split belongs to every split.

    Args:
        data: a folder with `annotations.jsonl` (rows: `image`, `captions`, perhaps `split` and more), or a
            directory of shards written by `blip-fast data pack`.
        split: None takes all rows.

    Raises:
        FileNotFoundError: `data` is neither.
        ValueError: a row is invalid, or no image belongs to the split.
    """
    data = Path(data)
    if (data / ANNOTATIONS).is_file():
        images = _of_folder(data)
    elif (data / INDEX).is_file():
        images = _of_shards(data)
    else:
        raise FileNotFoundError(f"{data} holds neither {ANNOTATIONS} nor {INDEX}: "
                                "name a folder of annotated images or of packed shards")
    chosen = [image for image in images if split is None or image.row.get("split", split) == split]
    if not chosen:
        raise ValueError(f"{data} holds no image of split {split!r}: name another --split")
    return chosen


class AnnotationFile:
    """The rows of a JSONL file, or of a CSV file with a header, both in UTF-8, read one by one.

    Each row comes with its place in the file, by which `row` reads it again. So rows can be read in another
    order without keeping them in memory.

    A row has `image`, a path, and `caption`, or in JSONL `captions`, a list. It may have `split`, an integer
    `id` and any other fields. It is returned with `captions` as a list, perhaps empty, and everything else
    unchanged. In JSONL a row may instead hold:

    - a question (VQA): `question`, and `answers` as a list of votes, an object of weights, or null in a test
      set with hidden answers;
    - a statement about two images (NLVR2): `image`, `second_image` and `label`, true or false;
    - a dialogue (VisDial): `dialog`, a list of rounds with `question` and `answer`, which the last round may
      lack. To rank answers, a round also has `candidates`, `right`, the place of the given answer among them,
      and `relevance`, a number for each.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FileNotFoundError; ValueError if the name ends in neither .jsonl nor .csv, or the header
        cannot be read."""
        self.path = Path(path)
        if self.path.suffix not in (".jsonl", ".csv"):
            raise ValueError(f"{path} must be JSONL or CSV, named .jsonl or .csv")
        self._header: list[str] | None = None
        with self._open_at(0) as (stream, lines):
            if stream.read(len(BOM_UTF8)) != BOM_UTF8:
                stream.seek(0)
            if self.path.suffix == ".csv":
                self._header = next(csv.reader(lines), [])
            self._start = stream.tell()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row's place and the row. Raises ValueError naming the first invalid row."""
        with self._open_at(self._start) as (stream, lines):
            place = self._start
            for number, content in self._contents(lines):
                yield place, _row(content, f"{self.path}, row {number}")
                place = stream.tell()

    def row(self, place: int) -> dict[str, Any]:
        """The row at a place that iteration returned."""
        with self._open_at(place) as (_, lines):
            return _row(next(self._contents(lines))[1], f"{self.path}, byte {place}")

    def _contents(self, lines: Iterator[str]) -> Iterator[tuple[int, Any]]:
        """Each row's number, from 1, and its content."""
        if self._header is None:
            return json_rows(lines, self.path)
        return enumerate(csv.DictReader(lines, self._header), start=1)

    @contextmanager
    def _open_at(self, place: int) -> Iterator[tuple[BinaryIO, Iterator[str]]]:
        """The open file at a place, and its lines from there on."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(place)
                yield stream, (line.decode() for line in iter(stream.readline, b""))
        except (UnicodeDecodeError, csv.Error) as error:
            kind = self.path.suffix[1:].upper()
            raise ValueError(f"{self.path} cannot be read as {kind} in UTF-8: {error}") from None


def read_annotations(path: str | Path) -> list[dict[str, Any]]:
    """All rows of an `AnnotationFile`. Raises what it raises."""
    return [row for _, row in AnnotationFile(path)]


def write_annotations(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as the `annotations.jsonl` of a folder."""
    (folder / ANNOTATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def json_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """Each line's number, from 1, and its content. Blank lines are left out."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, row {number} is not JSON: {error}") from None


def _row(row: Any, where: str) -> dict[str, Any]:
    """The row, checked, with its captions as a list. `where` names it in messages."""
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise ValueError(f'{where} has no "image", a path below the folder')
    if None in row:
        raise ValueError(f"{where} has more fields than the header: put captions that hold commas in quotes")
    row = dict(row)
    captions = row.pop("captions", [])
    if isinstance(captions, list) and "caption" in row:
        captions = [*captions, row.pop("caption")]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f'{where}: "caption" must be a text, "captions" a list of texts')
    if "id" in row:
        try:
            row["id"] = int(row["id"])
        except (TypeError, ValueError):
            raise ValueError(f'{where}: "id" is {row["id"]!r}, not an integer') from None
    if "question" in row and not _has_answers(row):
        raise ValueError(f'{where}: a "question" (a text) needs "answers": a list of texts, one a vote, '
                         "an object of texts and their weights above 0, or null")
    if "second_image" in row and not (isinstance(row["second_image"], str)
                                      and isinstance(row.get("label"), bool)):
        raise ValueError(f'{where}: a "second_image" (a path) needs a "label", true or false')
    if "dialog" in row and not _has_rounds(row["dialog"]):
        raise ValueError(f'{where}: a "dialog" needs rounds, each with a "question" and, but for the last, '
                         'an "answer" (texts); "candidates" are a list of texts, "right" is a place in it, '
                         '"relevance" a number of 0 or more for each')
    return {**row, "captions": captions}


def _has_answers(row: dict[str, Any]) -> bool:
    answers = row.get("answers", [])
    if answers is None:
        return isinstance(row["question"], str)
    weights = answers.values() if isinstance(answers, dict) else [1.0]
    return (isinstance(row["question"], str) and isinstance(answers, list | dict) and len(answers) > 0
            and all(isinstance(answer, str) for answer in answers)
            and all(isinstance(weight, int | float) and weight > 0 for weight in weights))


def _has_rounds(dialog: Any) -> bool:
    if not isinstance(dialog, list) or not dialog:
        return False
    return all(isinstance(one, dict) and isinstance(one.get("question"), str)
               and isinstance(one.get("answer", None if i < len(dialog) - 1 else ""), str)
               and _has_candidates(one) for i, one in enumerate(dialog))


def _has_candidates(one: dict[str, Any]) -> bool:
    candidates = one.get("candidates", [])
    if not isinstance(candidates, list) or not all(isinstance(candidate, str) for candidate in candidates):
        return False
    right, relevance = one.get("right", 0), one.get("relevance", [0] * len(candidates))
    return (isinstance(right, int) and (0 <= right < len(candidates) or "right" not in one)
            and isinstance(relevance, list) and len(relevance) == len(candidates)
            and all(isinstance(value, int | float) and value >= 0 for value in relevance))


def _of_folder(folder: Path) -> Iterator[AnnotatedImage]:
    for _, row in AnnotationFile(folder / ANNOTATIONS):
        second = (StoredImage(row["second_image"], folder / row["second_image"])
                  if "second_image" in row else None)
        yield AnnotatedImage(row["image"], folder / row["image"], captions=row["captions"], row=row,
                             second=second)


def _of_shards(directory: Path) -> Iterator[AnnotatedImage]:
    for shard in read_index(directory).shards:
        path = directory / shard.file
        records: dict[str, dict[str, Any]] = {}
        images: dict[str, tuple[int, int]] = {}
        seconds: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member) if extension == "json" else None
                if stream is not None:
                    records[key] = json.loads(stream.read())
                else:
                    place = seconds if extension.startswith(SECOND) else images
                    place[key] = (member.offset_data, member.size)
        for key, content in records.items():
            record = _row(content, f"{path}, sample {key}")
            second = (StoredImage(record["second_image"], LocalTar(path), *seconds[key])
                      if key in seconds else None)
            yield AnnotatedImage(record["image"], LocalTar(path), *images[key], captions=record["captions"],
                                 row=record, second=second)
