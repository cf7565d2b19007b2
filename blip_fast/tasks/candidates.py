"""The candidates of a retrieval while its images are read: the best so far, and the embeds of those images.

Both are bounded by the number of candidates, not by images × texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor


class RunningTopK:
    """Each query's k best items so far: `scores` [queries, at most k], best first, and `items` int64."""

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.empty(queries, 0, device=device)
        self.items = torch.empty(queries, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, items: Tensor) -> None:
        """Add items, int64 [new], with their scores [queries, new]."""
        scores, best = scores.topk(min(self.k, scores.shape[1]), dim=1)
        scores, items = torch.cat([self.scores, scores], dim=1), torch.cat([self.items, items[best]], dim=1)
        self.scores, best = scores.topk(min(self.k, scores.shape[1]), dim=1)
        self.items = items.gather(1, best)


class EmbedsFile:
    """Image embeds [tokens, width] in an unnamed temporary file, in slots that are reused.

    A file rather than memory, since the embeds of COCO's 5,000 images take 9 GB in float32; and rather than
    encoding again, which costs far more than reading (docs/decisions/tasks.md). The file is where Python's
    `tempfile` puts it; set `TMPDIR` to move it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._shape: torch.Size | None = None
        self._dtype = torch.float32

    def write(self, image: int, embeds: Tensor) -> None:
        """Store the embeds [tokens, width] of an image. Raises OSError if the disk is full."""
        self._shape, self._dtype = embeds.shape, embeds.dtype
        slot = self._free.pop() if self._free else len(self._slots)
        rest = _bytes(embeds.cpu().contiguous())
        self._file.seek(slot * len(rest))
        try:
            while rest:
                rest = rest[self._file.write(rest):]
        except OSError as error:
            raise OSError(f"the embeds of {len(self._slots) + 1} images do not fit into "
                          f"{tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder with more "
                          "room") from None
        self._slots[image] = slot

    def keep(self, images: Iterable[int]) -> None:
        """Forget all other images and free their slots."""
        kept = {image: self._slots[image] for image in images}
        self._free += [slot for image, slot in self._slots.items() if image not in kept]
        self._slots = kept

    def read(self, images: Tensor) -> Tensor:
        """Embeds [n, tokens, width] of images int64 [n], on their device."""
        assert self._shape is not None
        embeds = torch.empty(len(images), *self._shape, dtype=self._dtype)
        for image, row in zip(images.tolist(), embeds, strict=True):
            rest = _bytes(row)
            self._file.seek(self._slots[image] * len(rest))
            while rest:
                rest = rest[self._file.readinto(rest):]
        return embeds.to(images.device)

    def close(self) -> None:
        self._file.close()


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return x.view(torch.uint8).numpy().data.cast("B")
