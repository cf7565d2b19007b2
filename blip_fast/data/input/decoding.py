"""From encoded samples to batches: DALI decodes; on a CPU torch and NumPy resize, flip, augment and
normalise.

DALI's CPU resize takes eight times as long as torch's for 8-bit images, longer than all other work together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali.backend import TensorListCPU
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from torch import Tensor

from blip_fast.data.input import augment
from blip_fast.data.input.augment import Drawn
from blip_fast.data.input.graph import decoded, decoded_and_finished
from blip_fast.data.input.reader import Item
from blip_fast.media.images import MEAN, STD


@dataclass(frozen=True)
class ReadBatch:
    """A decoded batch. `images` are float32 [batch, 3, size, size] on the input's device, normalised; for
    pairs [batch, 2, 3, size, size]. Every other field has one entry per image or pair."""

    images: Tensor
    captions: list[str]  # one per image, cleaned, after the prompt; "" for a sample with a question
    ids: Tensor  # int64 [batch], on the CPU: equal ids are the same image
    records: list[dict[str, Any]]  # key, image, all captions, and all other fields of the annotations
    sources: list[str]  # names
    origins: list[str]  # of the captions: "web" or "synthetic" in shards by CapFilt, else ""

    @property
    def keys(self) -> list[str]:
        return [record["key"] for record in self.records]


def decode(
    batches: Iterator[list[Item]], image_size: int, batch_size: int, augmented: bool, threads: int,
    device: torch.device,
) -> Iterator[ReadBatch]:
    """Batches of at most `batch_size` images in order, decoded and finished. DALI decodes the next ones
    meanwhile."""
    on_gpu, ahead = device.type == "cuda", deque[list[Item]]()

    def feed() -> Iterator[tuple[list[np.ndarray], ...]]:
        for items in batches:
            ahead.append(items)
            yield columns(items, finished=on_gpu)

    if on_gpu:
        pipeline = decoded_and_finished(feed(), image_size, augmented, batch_size=batch_size,
                                        num_threads=threads, device_id=device.index or 0)
    else:
        pipeline = decoded(feed(), batch_size=batch_size, num_threads=threads, device_id=None)
    finish = HostFinish(image_size, ThreadPoolExecutor(threads, "finish"))
    pipeline.build()
    while True:
        try:
            (images,) = pipeline.run()
        except StopIteration:
            return
        items = ahead.popleft()
        if on_gpu:
            tensor = to_torch_tensor(images.as_tensor(), copy=True)
        else:
            assert isinstance(images, TensorListCPU)
            drawn = [drawn for item in items for drawn in item.drawn]
            tensor = finish([images.at(i) for i in range(len(images))], drawn)
        if len(tensor) != len(items):
            tensor = tensor.unflatten(0, (len(items), 2))
        records = [item.record for item in items]
        ids = torch.tensor([record["id"] for record in records], dtype=torch.int64)
        yield ReadBatch(tensor, [item.caption for item in items], ids, records,
                        [item.source for item in items], [item.origin for item in items])


def columns(items: list[Item], finished: bool) -> tuple[list[np.ndarray], ...]:
    """The inputs of the graph as columns: encoded, start, shape and, if it also finishes the images, flip and
    outcomes."""
    drawn = [drawn for item in items for drawn in item.drawn]
    window = ([encoded for item in items for encoded in item.encoded],
              [np.array(d.start, np.int32) for d in drawn], [np.array(d.shape, np.int32) for d in drawn])
    if not finished:
        return window
    return (*window, [np.array(d.flip, np.int32) for d in drawn],
            [np.array(d.outcomes or (0,) * augment.OPERATIONS, np.int32) for d in drawn])


class HostFinish:
    """Resizes, flips, augments and normalises decoded windows on the CPU, one thread per image."""

    def __init__(self, image_size: int, pool: ThreadPoolExecutor) -> None:
        self._size, self._pool = image_size, pool
        std = np.array(STD, dtype=np.float32)[:, None, None]
        self._scale, self._shift = 1 / (255 * std), -np.array(MEAN, dtype=np.float32)[:, None, None] / std

    def __call__(self, windows: list[np.ndarray], drawn: list[Drawn]) -> Tensor:
        """uint8 [height, width, 3] each → float32 [batch, 3, size, size]."""
        batch = torch.empty(len(windows), 3, self._size, self._size)
        for _ in self._pool.map(self._finish, windows, drawn, batch.numpy()):
            pass
        return batch

    def _finish(self, window: np.ndarray, drawn: Drawn, out: np.ndarray) -> None:
        channels_last = torch.from_numpy(window).permute(2, 0, 1)[None]
        size = (self._size, self._size)
        # For uint8 torch uses Pillow's filter in Pillow's fixed-point arithmetic.
        image = torch.nn.functional.interpolate(
            channels_last, size, mode="bicubic", antialias=True)[0].numpy()
        if drawn.flip:
            image = np.ascontiguousarray(image[:, :, ::-1])
        for outcome in drawn.outcomes:
            image = augment.apply_outcome(image, outcome)
        out[...] = image
        np.multiply(out, self._scale, out=out)
        np.add(out, self._shift, out=out)
