"""What every evaluation over a `BlipModel` needs: eval mode without gradients, and the images' visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from blip_kernels import row_blocks, sums_depend_on_rows
from torch import Tensor

from blip_fast.inference.cpu_packing import is_packed
from blip_fast.model.blip import BlipModel
from blip_fast.parallel.cores import each_on_a_core

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


def images_together(model: BlipModel, most: int) -> int:
    """How many images, up to `most`, are best encoded in one call: on a CPU one for each core, elsewhere all."""
    on_cpu = model.vision.cls_token.device.type == "cpu"
    return min(torch.get_num_threads() if is_packed(model) else 1, most) if on_cpu else most


def encode_images(model: BlipModel, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Visual tokens of images, batch by batch, on the model's device and in its dtype.

    On a CPU each image is encoded by itself, so that what it computes fits the caches; by a packed model each core
    encodes another one. An image's visual tokens then do not depend on the others of its batch, not by a bit.

    Args:
        images: [N, 3, image_size, image_size], which is cut into batches, or batches of any lengths; empty ones are
            left out. Videos are [N, frames, 3, image_size, image_size].

    Yields:
        [batch, tokens, vision width], of videos [batch, frames × tokens, vision width], frame after frame.
    """
    like = model.vision.cls_token
    for batch in images.split(IMAGE_BATCH) if isinstance(images, Tensor) else images:
        if len(batch):
            pixels = batch.to(like.device, like.dtype).flatten(0, -4)
            embeds = model.encode_images(pixels) if like.device.type != "cpu" else torch.cat(_each(model, pixels))
            yield embeds.view(len(batch), -1, embeds.shape[-1])


def _each(model: BlipModel, pixels: Tensor) -> list[Tensor]:
    """[1, tokens, vision width] of each image [images, 3, size, size], on a CPU."""

    def encode(image: Tensor) -> Tensor:
        with row_blocks(model.config.vision.tokens, one_input=True):
            return model.encode_images(image)

    images = pixels.split(1)
    # AMX gives other bits with another number of threads: there one image alone takes one core too.
    if is_packed(model) and (len(images) > 1 or sums_depend_on_rows(pixels.dtype)):
        return each_on_a_core(encode, images)
    return [encode(image) for image in images]
