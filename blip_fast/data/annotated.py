"""Images with their captions, to evaluate on: a folder with `annotations.jsonl`, or packed shards. Nothing is decoded
until it is asked for."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blip_fast.data.shards import INDEX, read_index
from blip_fast.images import ImageError, load_image

ANNOTATIONS = "annotations.jsonl"


@dataclass(frozen=True)
class AnnotatedImage:
    """One image, its captions and its whole row or record. In a shard it is `size` bytes from `start` on."""

    name: str
    captions: list[str]
    row: dict[str, Any]
    path: Path
    start: int = 0
    size: int | None = None

    def load(self) -> Image.Image:
        """Raises ImageError for an image that cannot be read."""
        if self.size is None:
            return load_image(self.path)
        try:
            with self.path.open("rb") as shard:
                shard.seek(self.start)
                content = shard.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.name}: {error}") from error
        return load_image(content, self.name)


def annotated_images(data: str | Path, split: str | None) -> list[AnnotatedImage]:
    """The images of a split, in order; a row that names no split belongs to every one.

    Args:
        data: a folder with `annotations.jsonl` (rows: `image`, `captions`, perhaps `split` and more), or a directory of
            shards that `blip-fast data pack` wrote.
        split: None takes all rows.

    Raises:
        FileNotFoundError: `data` is neither.
        ValueError: a row is not understood, or no image is of the split.
    """
    data = Path(data)
    if (data / ANNOTATIONS).is_file():
        images = _of_folder(data)
    elif (data / INDEX).is_file():
        images = _of_shards(data)
    else:
        raise FileNotFoundError(f"{data} holds neither {ANNOTATIONS} nor {INDEX}: name a folder of annotated images or "
                                "of packed shards")
    chosen = [image for image in images if split is None or image.row.get("split", split) == split]
    if not chosen:
        raise ValueError(f"{data} holds no image of split {split!r}: name another --split")
    return chosen


def _of_folder(folder: Path) -> Iterator[AnnotatedImage]:
    with (folder / ANNOTATIONS).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{folder / ANNOTATIONS}, row {number}"
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{where} is not JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                raise ValueError(f'{where} has no "image", a path below the folder')
            yield AnnotatedImage(row["image"], _captions(row, where), row, folder / row["image"])


def _of_shards(directory: Path) -> Iterator[AnnotatedImage]:
    for shard in read_index(directory).shards:
        path = directory / shard.file
        records: dict[str, dict[str, Any]] = {}
        images: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member) if extension == "json" else None
                if stream is not None:
                    records[key] = json.loads(stream.read())
                else:
                    images[key] = (member.offset_data, member.size)
        for key, record in records.items():
            name = record.get("source", key)
            yield AnnotatedImage(name, _captions(record, f"{path}, sample {key}"), record, path, *images[key])


def _captions(row: dict[str, Any], where: str) -> list[str]:
    captions = row.get("captions", [row["caption"]] if "caption" in row else [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f'{where}: "captions" must be a list of texts')
    return captions
