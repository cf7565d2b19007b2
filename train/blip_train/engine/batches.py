"""Reads, tokenises and copies the next batch to the device in a thread, so that it is
ready before the step ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from blip_fast.data.input.decoding import ReadBatch
from blip_fast.data.input.pipeline import TrainInput


class SeededBatch(NamedTuple):
    """What a training step takes, and the seed of its random numbers (dropout, negatives)."""

    batch: Any
    seed: int


class Batches:
    """Iterates over the batches of a source, epoch after epoch without end, one batch ahead.

    A batch's seed follows from `seed`, the source's share of the data and its
    position, whichever rank reads it.

    Attributes:
        state: the source's position after the batch that was taken last (not after the one that is ready).
        waited: total seconds that the consumer has waited.
        tokens: text tokens that it has taken.
    """

    def __init__(self, source: TrainInput, collate: Callable[[ReadBatch], Any], device: torch.device,
                 seed: int) -> None:
        """`collate` turns what was read into what the training step takes; see `prepare.collation`."""
        self._source, self._collate, self._device, self._seed = source, collate, device, seed
        self.state, self.waited, self.tokens = source.state_dict(), 0.0, 0
        self._thread = ThreadPoolExecutor(1, "batches")
        self._reading = self._read()
        self._next = self._thread.submit(next, self._reading)

    def __iter__(self) -> Iterator[SeededBatch]:
        return self

    def __next__(self) -> SeededBatch:
        """Raises whatever the reading thread raised."""
        start = time.perf_counter()
        seeded, self.state = self._next.result()
        self.waited += time.perf_counter() - start
        self.tokens += seeded.batch.text_tokens
        self._next = self._thread.submit(next, self._reading)
        return seeded

    def close(self) -> None:
        """Let the thread finish the last batch, which nobody will take."""
        self._thread.shutdown()

    def _read(self) -> Iterator[tuple[SeededBatch, dict[str, Any]]]:
        while True:
            for read in self._source:
                position = [self._seed, self._source.rank, self._source.epoch, self._source.step]
                seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
                yield SeededBatch(self._collate(read).to(self._device), seed), self._source.state_dict()
