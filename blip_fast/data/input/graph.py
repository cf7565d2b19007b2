"""The DALI graphs of the input: decode the window that was drawn; on a GPU resize, flip, augment and normalise there
(on a CPU `decoding.HostFinish` does that)."""

# DALI's stubs describe neither its enum members nor operators that take the result of another, nor conditions that are
# part of the graph.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

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
    """Columns (encoded, start, shape) → uint8 [height, width, 3], the window that `start` and `shape` (y, x) name."""
    return _window(*fn.external_source(source=columns, num_outputs=3), device="cpu")


@pipeline_def(enable_conditionals=True)
def decoded_and_finished(
    columns: Iterable[tuple[list[np.ndarray], ...]], image_size: int, augmented: bool, device: str = "gpu"
):
    """Columns (encoded, start, shape, flip, outcomes) → float32 [3, image_size, image_size], normalised. `device` is
    DALI's name for where: `gpu` or `cpu`."""
    encoded, start, shape, flip, outcomes = fn.external_source(source=columns, num_outputs=5)
    images = _window(encoded, start, shape, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=flip)
    if augmented:
        for i in range(augment.OPERATIONS):
            images = one_operation(images, outcomes[i], image_size)
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)


def _window(encoded: Any, start: Any, shape: Any, device: str) -> Any:
    # As in the published code, EXIF orientation is not applied.
    return fn.decoders.image_slice(
        encoded, start=start, shape=shape, axes=[0, 1], device=device, output_type=types.RGB, adjust_orientation=False
    )


def one_operation(images: Any, outcome: Any, image_size: int) -> Any:
    """Within a graph: apply RandAugment's operation that `outcome` (0–39, a scalar for each image) stands for to uint8
    [image_size, image_size, 3]."""
    if outcome < augment.WARPS:
        matrix = types.Constant(augment.warp_matrices(image_size))[outcome]
        images = fn.warp_affine(
            images, matrix=matrix, inverse_map=False, fill_value=augment.FILL, interp_type=types.INTERP_LINEAR
        )
    elif outcome < augment.SHIFTED:
        start = types.Constant(augment.SHIFTS)[outcome - augment.WARPS]
        size = [image_size, image_size]
        # A slice that starts outside moves the image; it is ten times cheaper than a warp.
        images = fn.slice(images, start, size, axes=[0, 1], out_of_bounds_policy="pad", fill_values=augment.FILL)
    elif outcome < augment.STRETCHED:
        images = augmentations.auto_contrast(images)
    elif outcome < augment.EQUALIZED:
        images = fn.equalize(images)
    else:
        images = images
    return images
