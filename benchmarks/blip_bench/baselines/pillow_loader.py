"""The usual input pipeline: a `torch.utils.data.DataLoader` whose workers read the shards' images and augment
them with Pillow as the published code does: random resized crop (bicubic), flip, RandAugment(2, 5), to
tensor, normalise."""

from __future__ import annotations

import io
import math
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
NAMES = ("identity", "auto contrast", "brightness", "sharpness", "equalize", "shear x", "shear y",
         "translate x", "translate y", "rotate")


@dataclass(frozen=True)
class Choices:
    """Random choices for an image. box: left, upper, right, lower. operations: name and sign, in order."""

    box: tuple[int, int, int, int]
    flip: bool
    operations: list[tuple[str, int]]


def choose(width: int, height: int, augment: bool) -> Choices:
    """As torchvision's RandomResizedCrop((0.2, 1)), RandomHorizontalFlip and the published RandomAugment."""
    operations = [(random.choice(NAMES), random.choice((-1, 1))) for _ in range(2) if random.random() < 0.5]
    return Choices(_box(width, height), random.random() < 0.5, operations if augment else [])


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = random.randint(0, width - w), random.randint(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2


def transform(image: Image.Image, choices: Choices, image_size: int) -> Tensor:
    """The image as float32 [3, image_size, image_size]."""
    image = image.crop(choices.box).resize((image_size, image_size), Image.Resampling.BICUBIC)
    if choices.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, sign in choices.operations:
        image = apply(image, name, sign)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.sub_(MEAN).div_(STD)


def apply(image: Image.Image, name: str, sign: int) -> Image.Image:
    """Apply an operation at magnitude 5 of 10, where brightness and sharpness do nothing (and are free)."""
    if name == "auto contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "rotate":
        return image.rotate(15 * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    if name.startswith("translate"):
        moved = Image.new("RGB", image.size, (128, 128, 128))
        moved.paste(image, (-5 * sign, 0) if name == "translate x" else (0, -5 * sign))
        return moved
    if name.startswith("shear"):
        backwards = (1, -0.15 * sign, 0, 0, 1, 0) if name == "shear x" else (1, 0, 0, -0.15 * sign, 1, 0)
        return image.transform(image.size, Image.Transform.AFFINE, backwards, Image.Resampling.BILINEAR,
                               fillcolor=(128, 128, 128))
    return image


class Photographs(Dataset[Tensor]):
    """The images of all tars in a directory, with random access."""

    def __init__(self, shards: Path, image_size: int, augment: bool) -> None:
        self._size, self._augment, self._places = image_size, augment, []
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as tar:
                self._places += [(path, member.offset_data, member.size) for member in tar
                                 if not member.name.endswith(".json")]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        path, start, size = self._places[index]
        with path.open("rb") as file:
            file.seek(start)
            image = Image.open(io.BytesIO(file.read(size))).convert("RGB")
        return transform(image, choose(*image.size, self._augment), self._size)


def batches(shards: Path, image_size: int, batch_size: int, workers: int, augment: bool) -> Iterator[Tensor]:
    """Shuffled batches [batch, 3, image_size, image_size], over endless epochs."""
    loader = DataLoader(Photographs(shards, image_size, augment), batch_size, shuffle=True,
                        num_workers=workers, drop_last=True, persistent_workers=True)
    while True:
        yield from loader
