"""DALI graphs of the training input: decode the window that was drawn and, on a GPU, resize, flip, augment
and normalise it. On a CPU `decoding.HostFinish` does the latter."""

# DALI's stubs lack its enum members, operators that take another operator's result, and conditions within a
# graph.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.pipeline import pipeline_def

from blip_fast.data.input import augment
from blip_fast.media.images import MEAN, STD


@pipeline_def
def decoded(columns: Iterable[tuple[list[np.ndarray], ...]]):
    """Columns (encoded, start, shape) → uint8 [height, width, 3]: the window given by `start` and `shape` (y,
    x)."""
    return _decode_window(*fn.external_source(source=columns, num_outputs=3), device="cpu")


@pipeline_def(enable_conditionals=True)
def decoded_and_finished(
    columns: Iterable[tuple[list[np.ndarray], ...]], image_size: int, augmented: bool, device: str = "gpu"
):
    """Columns (encoded, start, shape, flip, outcomes) → float32 [3, image_size, image_size], normalised.
    `device` is DALI's name of a device: `gpu` or `cpu`."""
    encoded, start, shape, flip, outcomes = fn.external_source(source=columns, num_outputs=5)
    images = _decode_window(encoded, start, shape, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=flip)
    if augmented:
        for i in range(augment.OPERATIONS):
            images = one_operation(images, outcomes[i], image_size)
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)


def _decode_window(encoded: Any, start: Any, shape: Any, device: str) -> Any:
    # The published code ignores EXIF orientation too.
    return fn.decoders.image_slice(
        encoded, start=start, shape=shape, axes=[0, 1], device=device, output_type=types.RGB,
        adjust_orientation=False
    )


def one_operation(images: Any, outcome: Any, image_size: int) -> Any:
    """Within a graph: apply RandAugment's operation of `outcome` (0–39, one scalar per image) to uint8
    [image_size, image_size, 3]."""
    if outcome < augment.WARPS_END:
        matrix = types.Constant(augment.warp_matrices(image_size))[outcome]
        images = fn.warp_affine(
            images, matrix=matrix, inverse_map=False, fill_value=augment.FILL, interp_type=types.INTERP_LINEAR
        )
    elif outcome < augment.SHIFTS_END:
        start = types.Constant(augment.SHIFTS)[outcome - augment.WARPS_END]
        size = [image_size, image_size]
        # A slice that starts outside the image shifts it, ten times cheaper than a warp.
        images = fn.slice(images, start, size, axes=[0, 1], out_of_bounds_policy="pad",
                          fill_values=augment.FILL)
    elif outcome < augment.STRETCHES_END:
        images = augmentations.auto_contrast(images)
    elif outcome < augment.EQUALIZES_END:
        images = fn.equalize(images)
    else:
        images = images
    return images
