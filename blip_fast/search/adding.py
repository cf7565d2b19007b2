"""Bringing an index up to date: which images are new or changed, their features, and writing them in portions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from blip_fast.media.images import ImageError, StoredImage
from blip_fast.model.blip import BlipModel
from blip_fast.search.embedding import image_features
from blip_fast.search.store import Entry, Store, Version
from blip_fast.tasks.model_loading import read_pixels

WRITE_IMAGES, WRITE_SECONDS = 32, 5.0  # what is encoded is written so often: being killed costs no more


@dataclass
class AddReport:
    """What became of the images that `Index.add` was given."""

    added: int = 0
    changed: int = 0  # had other features before: the file was written since
    unchanged: int = 0
    broken: int = 0  # could not be read

    @property
    def images(self) -> int:
        return self.added + self.changed + self.unchanged + self.broken


class Adding:
    """One pass over images; `report` counts them."""

    def __init__(self, store: Store, model: BlipModel, progress: Callable[[AddReport], None] | None) -> None:
        self.report = AddReport()
        self._store, self._model, self._progress = store, model, progress
        self._reading: deque[tuple[StoredImage, Version, bool]] = deque()  # in the order of their pixels
        self._encoded: list[Entry] = []
        self._unwritten: set[str] = set()  # names of both

    def run(self, images: Iterable[StoredImage]) -> None:
        """Index what is new or changed. What is encoded when the work is interrupted is written all the same."""
        written = time.monotonic()
        try:
            for pixels in read_pixels(self._wanted(images), self._model.config.vision.image_size):
                self._take(pixels)
                if len(self._encoded) >= WRITE_IMAGES or time.monotonic() - written > WRITE_SECONDS:
                    self._write()
                    written = time.monotonic()
        finally:
            self._write()

    def _wanted(self, images: Iterable[StoredImage]) -> Iterator[StoredImage]:
        for image in images:
            try:
                version = Version.of(image)
            except OSError:  # reading it will say why
                version = Version(image.start, 0, 0)
            known = self._store.version(image.name)
            if known == version or image.name in self._unwritten:  # the latter was named twice
                self.report.unchanged += 1
                self._tell()
            else:
                self._unwritten.add(image.name)
                self._reading.append((image, version, known is not None))
                yield image

    def _take(self, pixels: Tensor | ImageError) -> None:
        image, version, known = self._reading.popleft()
        result = str(pixels) if isinstance(pixels, ImageError) else image_features(self._model, pixels[None])[0]
        if not isinstance(result, str) and not np.isfinite(result).all():
            result = f"{image.name}: its features are no finite numbers: index in float32 or bfloat16"
        if isinstance(result, str):
            self.report.broken += 1
        elif known:
            self.report.changed += 1
        else:
            self.report.added += 1
        self._encoded.append(Entry(image, version, result))
        self._tell()

    def _write(self) -> None:
        if self._encoded:
            self._store.write(self._encoded)
            self._unwritten.difference_update(entry.image.name for entry in self._encoded)
            self._encoded = []

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.report)
