"""The DALI graph behind training and evaluation: read, check, decode, crop, resize, flip, RandAugment, normalise."""

# DALI's stubs describe neither its enum members nor operators that take the result of another.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import io
import json
import zlib
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from blip_fast.data.augment import rand_augment
from blip_fast.data.shards import EXTENSIONS
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
):
    """→ images float32 [3, image_size, image_size], records uint8 [bytes], whether the encoded image is undamaged."""
    encoded, record = fn.readers.webdataset(
        **reader, ext=[";".join(EXTENSIONS), "json"], missing_component_behavior="error", pad_last_batch=True
    )
    encoded, good = fn.python_function(encoded, record, function=_replace_damaged, num_outputs=2)
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
    return images, record, good


def _replace_damaged(encoded: np.ndarray, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inside the graph: an image whose checksum is not the packed one must not reach the decoder, where it would take
    the whole batch with it."""
    good = zlib.crc32(encoded) == json.loads(record.tobytes())["crc32"]  # pyright: ignore[reportArgumentType]
    return (encoded if good else BLANK), np.array(good)
