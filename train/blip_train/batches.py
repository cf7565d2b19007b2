"""The next batch, ready before the step ends: read, tokenised and copied to the device by a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from blip_fast.data.pipeline import Batch as ReadBatch
from blip_fast.data.pipeline import TrainInput


class Batches:
    """Iterates over the batches of a source, epoch after epoch without end, one batch ahead.

    Attributes: `state`, the source's position behind the batch that was taken last (not behind the one that is ready);
    `waited`, seconds that the taker has waited in all.
    """

    def __init__(self, source: TrainInput, collate: Callable[[ReadBatch], Any], device: torch.device) -> None:
        """`collate` makes what the training step takes of what was read; see `prepare.collation`."""
        self._source, self._collate, self._device = source, collate, device
        self.state, self.waited = source.state_dict(), 0.0
        self._thread = ThreadPoolExecutor(1, "batches")
        self._made = self._make()
        self._next = self._thread.submit(next, self._made)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Raises what reading raised."""
        start = time.perf_counter()
        batch, self.state = self._next.result()
        self.waited += time.perf_counter() - start
        self._next = self._thread.submit(next, self._made)
        return batch

    def close(self) -> None:
        """Let the thread finish the batch that nobody will take."""
        self._thread.shutdown()

    def _make(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        while True:
            for read in self._source:
                yield self._collate(read).to(self._device), self._source.state_dict()
