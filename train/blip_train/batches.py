"""The next batch, ready before the step ends: read, tokenised and copied to the device by a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from blip_fast.data.pipeline import TrainInput
from blip_fast.tokenizer import Tokenizer
from blip_train.pretraining import Batch


class Batches:
    """Iterates over the batches of a source, epoch after epoch without end, one batch ahead.

    Each batch brings a seed of its own, of what is drawn while it is learned from: made of `seed`, the source's share
    of the data and its position, whichever rank reads it.

    Attributes: `state`, the source's position behind the batch that was taken last (not behind the one that is ready);
    `waited`, seconds that the taker has waited in all; `tokens`, text tokens that it has taken.
    """

    def __init__(self, source: TrainInput, tokenizer: Tokenizer, max_tokens: int, device: torch.device,
                 seed: int) -> None:
        self._source, self._tokenizer, self._max_tokens, self._device = source, tokenizer, max_tokens, device
        self._seed = seed
        self.state, self.waited, self.tokens = source.state_dict(), 0.0, 0
        self._thread = ThreadPoolExecutor(1, "batches")
        self._made = self._make()
        self._next = self._thread.submit(next, self._made)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises what reading raised."""
        start = time.perf_counter()
        batch, self.state = self._next.result()
        self.waited += time.perf_counter() - start
        self.tokens += len(batch.texts.token_ids)
        self._next = self._thread.submit(next, self._made)
        return batch

    def close(self) -> None:
        """Let the thread finish the batch that nobody will take."""
        self._thread.shutdown()

    def _make(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        while True:
            for pairs in self._source:
                texts = self._tokenizer.pack(pairs.captions, max_tokens=self._max_tokens)
                position = [self._seed, self._source.rank, self._source.epoch, self._source.step]
                seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
                batch = Batch(pairs.images.to(self._device), texts.to(self._device), pairs.ids.to(self._device), seed)
                yield batch, self._source.state_dict()
