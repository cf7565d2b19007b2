"""What every evaluation over a `BlipModel` needs: eval mode without gradients, and images in batches on its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from blip_fast.model import BlipModel

IMAGE_BATCH = 32


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


def image_batches(model: BlipModel, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Images [N, 3, size, size], or batches of them of any lengths, on the model's device and in its dtype."""
    like = model.vision.cls_token
    for batch in images.split(IMAGE_BATCH) if isinstance(images, Tensor) else images:
        if len(batch):
            yield batch.to(like.device, like.dtype)
