"""What every evaluation over a `BlipModel` needs: eval mode without gradients, and the images' visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from blip_fast.model import BlipModel
from blip_fast.packed import is_packed

IMAGE_BATCH = 32
PACKED_TOGETHER = 2  # on a CPU: each weight is read once for both, and their activations still fit the caches

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

    On a CPU the images of a batch are encoded one at a time, or two by a packed model, so that what they compute fits
    the caches. An image's visual tokens then do not depend on the others of its batch, not by a bit.

    Args:
        images: [N, 3, image_size, image_size], which is cut into batches, or batches of any lengths; empty ones are
            left out. Videos are [N, frames, 3, image_size, image_size].

    Yields:
        [batch, tokens, vision width], of videos [batch, frames × tokens, vision width], frame after frame.
    """
    like = model.vision.cls_token
    for batch in images.split(IMAGE_BATCH) if isinstance(images, Tensor) else images:
        if len(batch):
            together = len(batch) if like.device.type != "cpu" else PACKED_TOGETHER if is_packed(model) else 1
            pixels = batch.to(like.device, like.dtype).flatten(0, -4)
            embeds = torch.cat([model.encode_images(some) for some in pixels.split(together)])
            yield embeds.view(len(batch), -1, embeds.shape[-1])
