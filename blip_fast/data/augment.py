"""RandAugment(2, 5) as BLIP's released code applies it, as a DALI graph.

Two operations, one after the other, are drawn among ten, and each is applied with probability 1/2: identity,
auto-contrast, brightness, sharpness, equalize, shear x, shear y, translate x, translate y, rotate. At magnitude 5 of 10
the released code's brightness and sharpness have factor 1 and change nothing. Seven operations are left: shear by
± 0.15, translate by ± 5 pixels, rotate by ± 15° about the centre, auto-contrast and equalize, both for each channel
alone. Pixels from outside the image are 128.

Equalize follows OpenCV's formula; the released code's is Pillow's, a few levels apart where a channel's darkest or
brightest value is frequent.
"""

# DALI's stubs describe neither its enum members nor conditions that are part of the graph.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations

OPERATIONS = 2
SHEAR, SHIFT, ANGLE = 0.15, 5, math.radians(15)
FILL = 128

# One operation is one of 40 equally likely outcomes: ten operations, applied or not, with either sign. 0–5 warp,
# 6–9 translate, 10–11 stretch the contrast, 12–13 equalize, and 26 leave the image alone.
OUTCOMES = 40
SHIFTS = np.array([[0, SHIFT], [0, -SHIFT], [SHIFT, 0], [-SHIFT, 0]], dtype=np.int32)  # (y, x)


def warp_matrices(image_size: int) -> np.ndarray:
    """The six warps, source → destination in (x, y), float32 [6, 2, 3]."""
    centre, matrices = image_size / 2, []
    for sign in (1, -1):
        cos, sin = math.cos(ANGLE), math.sin(sign * ANGLE)
        rotation = [[cos, sin, centre * (1 - cos - sin)], [-sin, cos, centre * (1 - cos + sin)]]
        matrices += [[[1, sign * SHEAR, 0], [0, 1, 0]], [[1, 0, 0], [sign * SHEAR, 1, 0]], rotation]
    return np.array(matrices, dtype=np.float32)


def rand_augment(images: Any, image_size: int) -> Any:
    """uint8 [image_size, image_size, 3] → the same. Call it inside a pipeline definition with conditionals enabled."""
    for _ in range(OPERATIONS):
        images = one_operation(images, fn.random.choice(OUTCOMES), image_size)
    return images


def one_operation(images: Any, outcome: Any, image_size: int) -> Any:
    """Apply the operation that `outcome` (0–39, a scalar for each image) stands for."""
    if outcome < 6:
        matrix = types.Constant(warp_matrices(image_size))[outcome]
        images = fn.warp_affine(
            images, matrix=matrix, inverse_map=False, fill_value=FILL, interp_type=types.INTERP_LINEAR
        )
    elif outcome < 10:
        start = types.Constant(SHIFTS)[outcome - 6]
        size = [image_size, image_size]
        # A slice that starts outside moves the image; it is ten times cheaper than a warp.
        images = fn.slice(images, start, size, axes=[0, 1], out_of_bounds_policy="pad", fill_values=FILL)
    elif outcome < 12:
        images = augmentations.auto_contrast(images)
    elif outcome < 14:
        images = fn.equalize(images)
    else:
        images = images
    return images
