"""What every evaluation over a `BlipModel` needs: eval mode without gradients, and the images' visual
tokens."""

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
    """No dropout and no gradients inside. Afterwards every module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluated(model: BlipModel, results: Iterator[Result]) -> Iterator[Result]:
    """The same results, each computed under `evaluating`. Between two of them the consumer has its own modes
    and gradients."""
    while True:
        with evaluating(model):
            try:
                result = next(results)
            except StopIteration:
                return
        yield result


def images_together(model: BlipModel, most: int) -> int:
    """How many images, up to `most`, are best encoded in one call: on a CPU one per core (one alone if the
    model is not packed), elsewhere all."""
    on_cpu = model.vision.cls_token.device.type == "cpu"
    return min(torch.get_num_threads() if is_packed(model) else 1, most) if on_cpu else most


def encode_images(model: BlipModel, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Visual tokens of images, batch by batch, on the model's device and in its dtype.

    On a CPU each image is encoded by itself, so that its intermediate results fit the caches; with a packed
    model each core encodes another image. No bit of an image's visual tokens then depends on the other images
    of its batch.

    Args:
        images: [N, 3, image_size, image_size], which is cut into batches, or batches of any lengths; empty
            ones are left out. Videos are [N, frames, 3, image_size, image_size].

    Yields:
        [batch, tokens, vision width], of videos [batch, frames × tokens, vision width], frame after frame.
    """
    like = model.vision.cls_token
    for batch in images.split(IMAGE_BATCH) if isinstance(images, Tensor) else images:
        if len(batch):
            pixels = batch.to(like.device, like.dtype).flatten(0, -4)
            on_cpu = like.device.type == "cpu"
            embeds = torch.cat(_one_by_one(model, pixels)) if on_cpu else model.encode_images(pixels)
            yield embeds.view(len(batch), -1, embeds.shape[-1])


def _one_by_one(model: BlipModel, pixels: Tensor) -> list[Tensor]:
    """[1, tokens, vision width] of each image [images, 3, size, size], on a CPU."""

    def encode(image: Tensor) -> Tensor:
        with row_blocks(model.config.vision.tokens, one_input=True):
            return model.encode_images(image)

    images = pixels.split(1)
    # AMX gives other bits with another number of threads: there one image alone takes one core too.
    if is_packed(model) and (len(images) > 1 or sums_depend_on_rows(pixels.dtype)):
        return each_on_a_core(encode, images)
    return [encode(image) for image in images]
