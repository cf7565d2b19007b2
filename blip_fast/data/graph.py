"""The DALI graph behind training and evaluation: read, check, decode, crop, resize, flip, RandAugment, normalise."""

# DALI's stubs describe neither its enum members nor operators that take the result of another.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import io
import json
import zlib
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from blip_fast.data.augment import rand_augment
from blip_fast.data.shards import EXTENSIONS, SECOND
from blip_fast.images import MEAN, STD

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random crops


def _encoded_blank() -> np.ndarray:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


BLANK = _encoded_blank()  # decoded in the place of a damaged image


@pipeline_def(enable_conditionals=True)
def decoded_and_normalised(
    reader: dict[str, Any],
    image_size: int,
    decoder: str,
    crop_scale: tuple[float, float] | None,
    flip: bool,
    augment: bool,
    pairs: bool,
):
    """→ images float32 [3, image_size, image_size], or [2, 3, image_size, image_size] of `pairs`; records uint8
    [bytes]; whether the encoded images are undamaged."""
    checksums = {"": "crc32"} | ({SECOND: "second_crc32"} if pairs else {})
    components = [";".join(f"{prefix}{extension}" for extension in EXTENSIONS) for prefix in checksums]
    *encoded, record = fn.readers.webdataset(
        **reader, ext=[*components, "json"], missing_component_behavior="error", pad_last_batch=True
    )
    options = image_size, decoder, crop_scale, flip, augment
    read = [_picture(encoded[i], record, checksum, *options) for i, checksum in enumerate(checksums.values())]
    images = fn.stack(*[image for image, _ in read]) if pairs else read[0][0]
    good = read[0][1] & read[-1][1]
    return images, record, good


def _picture(
    encoded: Any,
    record: Any,
    checksum: str,
    image_size: int,
    decoder: str,
    crop_scale: tuple[float, float] | None,
    flip: bool,
    augment: bool,
):
    """One encoded image → float32 [3, image_size, image_size], and whether it is undamaged."""
    replace_damaged = partial(_replace_damaged, checksum=checksum)
    encoded, good = fn.python_function(encoded, record, function=replace_damaged, num_outputs=2)
    # As in the published code, EXIF orientation is not applied.
    decoding = {"device": decoder, "output_type": types.RGB, "adjust_orientation": False}
    if crop_scale is not None:
        images = fn.decoders.image_random_crop(
            encoded, **decoding, random_area=crop_scale, random_aspect_ratio=ASPECT_RATIOS
        )
    else:
        images = fn.decoders.image(encoded, **decoding)
    images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_CUBIC, antialias=True)
    if flip:
        images = fn.flip(images, horizontal=fn.random.coin_flip())
    if augment:
        images = rand_augment(images, image_size)
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
    return images, good


def _replace_damaged(encoded: np.ndarray, record: np.ndarray, checksum: str) -> tuple[np.ndarray, np.ndarray]:
    """Inside the graph: an image whose checksum is not the packed one must not reach the decoder, where it would take
    the whole batch with it."""
    good = zlib.crc32(encoded) == json.loads(record.tobytes())[checksum]  # pyright: ignore[reportArgumentType]
    return (encoded if good else BLANK), np.array(good)
