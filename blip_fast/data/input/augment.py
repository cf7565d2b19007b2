"""Random choices for a training image, and RandAugment(2, 5) as BLIP's released code applies it.

Two operations are drawn from ten and applied in turn, each with probability 1/2: identity, auto-contrast,
brightness, sharpness, equalize, shear x, shear y, translate x, translate y, rotate. At magnitude 5 of 10 the
released code's brightness and sharpness have factor 1 and change nothing. That leaves seven operations: shear
by ± 0.15, translate by ± 5 pixels, rotate by ± 15° about the centre, and auto-contrast and equalize, which
treat each channel separately. Pixels from outside the image are 128.

Equalize follows OpenCV's formula. The released code uses Pillow's; the two differ by a few levels when a
channel's darkest or brightest value is frequent.

This module implements the operations with NumPy and torch, on one image at a time so that it stays in a CPU's
cache. `graph.py` implements them with DALI for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

OPERATIONS = 2
SHEAR, SHIFT, ANGLE = 0.15, 5, math.radians(15)
FILL = 128
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random crops
CROP_ATTEMPTS = 10

# Each operation is drawn as one of 40 equally likely outcomes: ten operations, applied or not, with either
# sign. Outcomes 0–5 warp, 6–9 translate, 10–11 stretch the contrast, 12–13 equalize, and the other 26 leave
# the image alone.
OUTCOMES = 40
WARPS_END, SHIFTS_END, STRETCHES_END, EQUALIZES_END = 6, 10, 12, 14  # exclusive ends of the kinds' outcomes
SHIFTS = np.array([[0, SHIFT], [0, -SHIFT], [SHIFT, 0], [-SHIFT, 0]], dtype=np.int32)  # (y, x)


@dataclass(frozen=True)
class Drawn:
    """Random choices for one image: the window to keep, in pixels, whether to mirror it, and RandAugment's
    outcomes."""

    start: tuple[int, int]  # y, x
    shape: tuple[int, int]  # height, width
    flip: bool = False
    outcomes: tuple[int, ...] = ()


def draw(
    rng: np.random.Generator, height: int, width: int, crop_scale: tuple[float, float] | None, flip: bool,
    augment: bool
) -> Drawn:
    """Draw the choices for an image of this size. `crop_scale` is the (least, most) share of the area that a
    crop keeps; None keeps the whole image."""
    start, shape = (((0, 0), (height, width)) if crop_scale is None
                    else _draw_window(rng, height, width, crop_scale))
    mirrored = flip and rng.random() < 0.5
    outcomes = rng.integers(OUTCOMES, size=OPERATIONS).tolist() if augment else ()
    return Drawn(start, shape, mirrored, tuple(outcomes))


def _draw_window(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw a crop as torchvision's RandomResizedCrop does, which the published code uses.

    Area, logarithm of the aspect ratio, and position are uniform. After ten windows that do not fit, take the
    largest centred window with an allowed aspect ratio.
    """
    low, high = ASPECT_RATIOS
    for area, ratio in zip(
        rng.uniform(*scale, CROP_ATTEMPTS) * height * width,
        np.exp(rng.uniform(math.log(low), math.log(high), CROP_ATTEMPTS)),
        strict=True,
    ):
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))), (h, w)
    h = min(height, round(width / low))
    w = min(width, round(height * high))
    return ((height - h) // 2, (width - w) // 2), (h, w)


def warp_matrices(image_size: int) -> np.ndarray:
    """The six warps as matrices from source to destination (x, y), float32 [6, 2, 3]."""
    centre, matrices = image_size / 2, []
    for sign in (1, -1):
        cos, sin = math.cos(ANGLE), math.sin(sign * ANGLE)
        rotation = [[cos, sin, centre * (1 - cos - sin)], [-sin, cos, centre * (1 - cos + sin)]]
        matrices += [[[1, sign * SHEAR, 0], [0, 1, 0]], [[1, 0, 0], [sign * SHEAR, 1, 0]], rotation]
    return np.array(matrices, dtype=np.float32)


def apply_outcome(image: np.ndarray, outcome: int) -> np.ndarray:
    """Apply the operation of `outcome` (0–39) to uint8 [3, size, size]. The result has the same type and
    shape."""
    if outcome < WARPS_END:
        return _warp(image, outcome)
    if outcome < SHIFTS_END:
        return _shift(image, *SHIFTS[outcome - WARPS_END].tolist())
    if outcome < STRETCHES_END:
        return np.stack([_stretch(channel) for channel in image])
    if outcome < EQUALIZES_END:
        return np.stack([_equalize(channel) for channel in image])
    return image


def _warp(image: np.ndarray, which: int) -> np.ndarray:
    # grid_sample pads with zeros: subtract the fill value first, so that padding becomes the fill.
    centred = torch.from_numpy(np.subtract(image, FILL, dtype=np.float32))
    grid = _warp_grids(image.shape[-1])[which]
    warped = torch.nn.functional.grid_sample(centred[None], grid[None], align_corners=False)[0].numpy()
    return np.rint(warped + FILL).astype(np.uint8)


@cache
def _warp_grids(image_size: int) -> Tensor:
    """The source of each destination pixel, in `grid_sample`'s format: float32 [6, size, size, 2], (x, y) in
    ± 1."""
    matrices = np.concatenate([warp_matrices(image_size), np.tile([[[0, 0, 1]]], (WARPS_END, 1, 1))], axis=1)
    centres = np.arange(image_size) + 0.5
    x, y = np.meshgrid(centres, centres)
    places = np.stack([x, y, np.ones_like(x)], axis=-1)  # [size, size, 3]
    sources = np.einsum("mij,yxj->myxi", np.linalg.inv(matrices)[:, :2], places)
    return torch.from_numpy((2 * sources / image_size - 1).astype(np.float32))


def _shift(image: np.ndarray, y: int, x: int) -> np.ndarray:
    """Pixel (i, j) takes the value of pixel (i + y, j + x)."""
    size = image.shape[-1]
    shifted = np.full_like(image, FILL)
    shifted[:, max(-y, 0) : size - max(y, 0), max(-x, 0) : size - max(x, 0)] = image[
        :, max(y, 0) : size - max(-y, 0), max(x, 0) : size - max(-x, 0)
    ]
    return shifted


def _stretch(channel: np.ndarray) -> np.ndarray:
    """The darkest value becomes 0, the brightest 255."""
    low, high = int(channel.min()), int(channel.max())
    if low == high:
        return channel
    return ((channel - np.float32(low)) * np.float32(255 / (high - low)) + np.float32(0.5)).astype(np.uint8)


def _equalize(channel: np.ndarray) -> np.ndarray:
    """Map each value to the share of pixels that are darker or equal; the darkest value becomes 0."""
    below = np.cumsum(np.bincount(channel.reshape(-1), minlength=256))
    darkest = below[channel.min()]
    if darkest == below[-1]:
        return channel
    return np.rint(255 * (below - darkest) / (below[-1] - darkest)).astype(np.uint8)[channel]
