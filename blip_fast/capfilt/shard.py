"""Puts one shard of web images through CapFilt: threads read and check them, then they are captioned,
filtered and written.

The output depends only on the shard, the models and the options, so a shard that was interrupted gives the
same bytes when it is processed again. An image that cannot be read, or that training could not decode, is
refused with the reason.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip_fast.capfilt.clean import CapFiltConfig, WebImage, capfilt_stream
from blip_fast.capfilt.folder import CleanFolder, RefusedSample
from blip_fast.data.shards.pack import checked
from blip_fast.data.shards.tars import LocalTar, RemoteTar, StoredSample
from blip_fast.media.images import SUFFIXES, ImageError, StoredImage, image_pixels
from blip_fast.parallel.read_ahead import read_ahead
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher


@dataclass(frozen=True, eq=False)
class ShardImage(WebImage):
    """A web image of a shard: its key in the shard, the encoded image (JPEG, PNG or WebP) and its record."""

    key: str
    content: bytes
    record: dict[str, Any]


def clean_shard(tar: LocalTar | RemoteTar, number: int, folder: CleanFolder, captioner: Captioner,
                matcher: Matcher, config: CapFiltConfig, batch_size: int) -> None:
    """Put all images of a tar through CapFilt and write shard `number` of the folder. From a tar that is
    broken after its start, the samples before the break are used, and the tar itself is listed as refused.

    Raises OSError if the tar cannot be opened or something cannot be written, and what `capfilt_stream`
    raises.
    """
    refused: list[RefusedSample] = []

    def readable() -> Iterator[ShardImage]:
        read = partial(read_image, image_size=captioner.model.config.vision.image_size)
        for sample, image in read_ahead(_samples(tar), read):
            if isinstance(image, ImageError):
                refused.append(_refused_sample(tar.name if isinstance(sample, ImageError) else sample.name,
                                               image))
            else:
                yield image

    with folder.shard(number) as shard:
        for image, found in capfilt_stream(captioner, matcher, readable(), config, batch_size=batch_size):
            if isinstance(found, ImageError):
                refused.append(_refused_sample(f"{tar.name}/{image.key}", found))
            else:
                shard.add(image.key, image.content, image.record, found)
        shard.finish(tar.name, refused)


def _samples(tar: LocalTar | RemoteTar) -> Iterator[StoredSample | ImageError]:
    try:
        yield from tar.samples()
    except ValueError as error:
        yield ImageError(str(error))


def _refused_sample(name: str, error: ImageError) -> RefusedSample:
    return RefusedSample(name, str(error).removeprefix(f"{name}: "))


def read_image(sample: StoredSample | ImageError, image_size: int) -> ShardImage | ImageError:
    """A sample's single image with its captions, or the reason why it cannot be used. An error is returned
    unchanged.

    Captions are the record's `captions` or `caption` (KEY.json), or else the text in KEY.txt.
    """
    if isinstance(sample, ImageError):
        return sample
    try:
        pictures = [member for member in sample.members.values()
                    if Path(member.name).suffix.lower() in SUFFIXES]
        if len(pictures) != 1:
            raise ImageError(f"the sample holds {len(pictures)} images: CapFilt takes one and its captions")
        record = _record(sample)
        content = _checked_content(pictures[0], record)
        pixels = image_pixels(content, image_size, sample.name)
    except ImageError as error:
        return error
    return ShardImage(record["image"], pixels, record["captions"], sample.key, content, record)


def _checked_content(picture: StoredImage, record: dict[str, Any]) -> bytes:
    """The encoded image. One that was packed for training was checked then: compare its checksum. Check any
    other now."""
    content = picture.read()
    if "crc32" in record:
        if zlib.crc32(content) != record["crc32"]:
            raise ImageError("damaged since it was packed: its checksum differs")
        return content
    found = checked(content, picture.name)
    if isinstance(found, ImageError):
        raise found
    return found


def _record(sample: StoredSample) -> dict[str, Any]:
    """The sample's record with `image`, `captions` and, if it has one, an integer `id`."""
    stored, text = sample.members.get("json"), sample.members.get("txt")
    try:
        record = {} if stored is None else json.loads(stored.read())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ImageError("its record is no JSON object")
    captions = record.pop("captions", None) or []
    if (caption := record.pop("caption", None)) is not None:
        captions = [*captions, caption]
    if not captions and text is not None:
        captions = [text.read().decode("utf-8", "replace").strip()]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ImageError('its "captions" are no list of texts')
    if not (isinstance(record.get("id"), int) and abs(record["id"]) < 2**63):
        record.pop("id", None)  # writing derives one from the image's content
    name = record.get("image")
    record |= {"image": name if isinstance(name, str) else sample.key, "captions": captions}
    # Replace lone surrogates, which come from escapes in JSON or from a file name that is not UTF-8.
    return json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
