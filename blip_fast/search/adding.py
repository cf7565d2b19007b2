"""Updates an index: finds new and changed images, computes their features and writes them in portions."""

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

# Write after this many images or seconds: a killed process loses no more.
WRITE_IMAGES, WRITE_SECONDS = 32, 5.0


@dataclass
class AddReport:
    """How many of the images given to `Index.add` were added, changed, unchanged or broken."""

    added: int = 0
    changed: int = 0  # already indexed, but the file was written since
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
        self._unwritten: set[str] = set()  # names of images in `_reading` or `_encoded`

    def run(self, images: Iterable[StoredImage]) -> None:
        """Index new and changed images. If the work is interrupted, images that are already encoded are still
        written."""
        written = time.monotonic()
        try:
            for pixels in read_pixels(self._outdated(images), self._model.config.vision.image_size):
                self._encode(pixels)
                if len(self._encoded) >= WRITE_IMAGES or time.monotonic() - written > WRITE_SECONDS:
                    self._write()
                    written = time.monotonic()
        finally:
            self._write()

    def _outdated(self, images: Iterable[StoredImage]) -> Iterator[StoredImage]:
        """The images that are new or have changed."""
        for image in images:
            try:
                version = Version.of(image)
            except OSError:  # the reason is reported when the image is read
                version = Version(image.start, 0, 0)
            known = self._store.version(image.name)
            if known == version or image.name in self._unwritten:  # unwritten: it was named twice
                self.report.unchanged += 1
                self._report_progress()
            else:
                self._unwritten.add(image.name)
                self._reading.append((image, version, known is not None))
                yield image

    def _encode(self, pixels: Tensor | ImageError) -> None:
        image, version, known = self._reading.popleft()
        result = (str(pixels) if isinstance(pixels, ImageError)
                  else image_features(self._model, pixels[None])[0])
        if not isinstance(result, str) and not np.isfinite(result).all():
            result = f"{image.name}: its features are no finite numbers: index in float32 or bfloat16"
        if isinstance(result, str):
            self.report.broken += 1
        elif known:
            self.report.changed += 1
        else:
            self.report.added += 1
        self._encoded.append(Entry(image, version, result))
        self._report_progress()

    def _write(self) -> None:
        if self._encoded:
            self._store.write(self._encoded)
            self._unwritten.difference_update(entry.image.name for entry in self._encoded)
            self._encoded = []

    def _report_progress(self) -> None:
        if self._progress is not None:
            self._progress(self.report)
