"""What all tasks share: loading a checkpoint onto a device, and reading images ahead of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip_fast.checkpoint import load_model
from blip_fast.inference.cpu_packing import pack_linear_layers
from blip_fast.inference.int8 import quantise_linear_layers, require_torchao
from blip_fast.inference.precision import advice, check, parameter_type, resolve, say
from blip_fast.media.images import ImageError, ImageSource, StoredImage, image_pixels
from blip_fast.model.blip import BlipModel
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.parallel.read_ahead import read_ahead


def load_for_task(source: str | Path, *, dtype: str = "auto", device: str | None = None,
                  image_size: int | None = None, heads: int | None = None,
                  tokenizer: str | Path | None = None, threads: int | None = None,
                  differentiable: bool = False) -> tuple[BlipModel, Tokenizer]:
    """Load a model and its tokenizer for inference. On a CPU, linear layers are packed (`cpu_packing.py`).

    Args:
        source: a checkpoint directory, a Hub model or a published `.pth`, as for `load_model`.
        dtype: `auto` (the best that the device supports: see `precision.resolve`), `float32`, `bfloat16`,
            `float16` (on a GPU, or on a CPU with float16 products), or `int8`: the weights of the blocks in 8
            bits and the rest in bfloat16, or in float32 if the processor has no bfloat16 products. A named
            dtype that is slow here is used all the same, with a warning on the error stream.
        device: default: `cuda` if available, else `cpu`.
        image_size: resize the position embeddings for images of this size.
        heads: attention heads of a `.pth` whose heads are not 64 wide.
        tokenizer: a directory or Hub model with `tokenizer.json` or `vocab.txt`, or a `vocab.txt` file;
            required if the checkpoint contains none.
        threads: for CPU products, in the whole process. The default is torch's: one per physical core, or
            OMP_NUM_THREADS.
        differentiable: leave the linear layers unpacked, so that gradients pass through them; `auto` is then
            float32.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; a dtype that is unknown or cannot be used here; a
            device that does not exist; fewer than 1 thread; no tokenizer, or one with more tokens than the
            model has embeddings.
    """
    target = chosen_device(device)
    precision = _precision(dtype, target, differentiable)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: products need 1 thread at least")
        torch.set_num_threads(threads)
    given = None if tokenizer is None else Tokenizer.from_pretrained(tokenizer)
    model, fitting = load_model(source, tokenizer=given, image_size=image_size, heads=heads,
                                dtype=parameter_type(precision, target))
    if fitting is None:
        raise ValueError(f"{source} brings no tokenizer: name a directory with vocab.txt (--tokenizer)")
    model = model.to(target)
    if precision == "int8":
        quantise_linear_layers(model)
    elif not differentiable:
        pack_linear_layers(model)
    return model, fitting


def _precision(name: str, device: torch.device, differentiable: bool) -> str:
    """Resolve a named precision. Raises ValueError if it cannot be used."""
    precision = resolve(name, device, differentiable)
    if precision == "int8" and differentiable:
        raise ValueError("dtype int8 is for inference alone, and this needs gradients: choose "
                         "float32 or auto")
    if precision == "int8":
        require_torchao(device)
    check(precision, device)
    if (line := advice(name, device)) is not None:
        say(line)
    return precision


class PretrainedTask:
    """Base of the tasks that consist of a model and its tokenizer, and can be loaded from a checkpoint."""

    differentiates: ClassVar[bool] = False  # whether the task computes gradients

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: str = "auto", device: str | None = None,
                        image_size: int | None = None, heads: int | None = None,
                        tokenizer: str | Path | None = None, threads: int | None = None) -> Self:
        """Load a checkpoint directory, a Hub model or a published `.pth`; options as for `load_for_task`."""
        return cls(*load_for_task(source, dtype=dtype, device=device, image_size=image_size, heads=heads,
                                  tokenizer=tokenizer, threads=threads, differentiable=cls.differentiates))


def as_sources(images: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """One image or many → a list. An array or tensor with four dimensions is a batch of images."""
    if isinstance(images, np.ndarray | Tensor):
        return [*images] if images.ndim == 4 else [images]
    return [images] if isinstance(images, str | Path | bytes | Image.Image | StoredImage) else [*images]


def read_pixels(images: Iterable[ImageSource], image_size: int) -> Iterator[Tensor | ImageError]:
    """Read and transform images in threads, ahead of the consumer.

    Yields:
        In order, float32 [3, image_size, image_size], or the error of an image that cannot be read.
    """
    for _, pixels in read_ahead(images, lambda image: pixels_or_error(image, image_size)):
        yield pixels


def pixels_or_error(image: ImageSource, image_size: int, name: str | None = None) -> Tensor | ImageError:
    """`image_pixels`, but an ImageError is returned, not raised."""
    try:
        return image_pixels(image, image_size, name)
    except ImageError as error:
        return error


def pixel_batches(images: Iterable[ImageSource], image_size: int, batch_size: int) -> Iterator[Tensor]:
    """Batches [at most batch_size, 3, image_size, image_size]. Raises ImageError at a broken image."""
    batch: list[Tensor] = []
    for pixels in read_pixels(images, image_size):
        if isinstance(pixels, ImageError):
            raise pixels
        batch.append(pixels)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def chosen_device(name: str | None) -> torch.device:
    """The named device; default: `cuda` if available, else `cpu`. Raises ValueError if it does not exist."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)
