"""What every evaluation over a `BlipModel` needs: eval mode without gradients, and the images' visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from blip_fast.model import BlipModel

IMAGE_BATCH = 32

Result = TypeVar("Result")


@contextmanager
def evaluating(model: BlipModel) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluated(model: BlipModel, results: Iterator[Result]) -> Iterator[Result]:
    """The same results, each computed under `evaluating`; whoever takes them does as they like in between."""
    while True:
        with evaluating(model):
            try:
                result = next(results)
            except StopIteration:
                return
        yield result


def encode_images(model: BlipModel, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Visual tokens of images, batch by batch, on the model's device and in its dtype.

    On a CPU the images of a batch are encoded one at a time: what an image computes then fits the caches, and its
    visual tokens do not depend on the others of its batch, not by a bit.

    Args:
        images: [N, 3, image_size, image_size], which is cut into batches, or batches of any lengths; empty ones are
            left out.

    Yields:
        [batch, tokens, vision width].
    """
    like = model.vision.cls_token
    for batch in images.split(IMAGE_BATCH) if isinstance(images, Tensor) else images:
        if len(batch):
            together = 1 if like.device.type == "cpu" else len(batch)
            pixels = batch.to(like.device, like.dtype)
            yield torch.cat([model.encode_images(some) for some in pixels.split(together)])
