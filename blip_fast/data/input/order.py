"""The order in which one share of a source's samples is read: a function of the seed and the position alone.

Each epoch permutes the shards and splits all samples evenly into contiguous shares, so that a share needs
only its own shards. Ranks rotate through the shares from epoch to epoch. Within a share, blocks of `buffer`
samples are shuffled. Nothing depends on what was read before, so reading can resume at any position at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

SHARDS, BLOCK, SAMPLE = range(3)  # purpose of a random generator, the second word of its seed
BLOCKS_KEPT = 3
EPOCHS_KEPT = 2

Key = TypeVar("Key")
Value = TypeVar("Value")


class Order:
    """The batches of share `rank` of `world_size`, each of `per_batch` samples. An epoch has `steps` batches;
    its last, partial batch is dropped.

    Args:
        counts: samples of each shard.
        seed: of the run and of the source, two words.
    """

    def __init__(
        self, counts: Sequence[int], per_batch: int, buffer: int, seed: tuple[int, int], rank: int,
        world_size: int
    ) -> None:
        self._counts = np.array(counts, dtype=np.int64)
        self._samples = int(self._counts.sum())
        self.per_batch, self.steps = per_batch, self._samples // world_size // per_batch
        self._buffer, self._seed, self._rank, self._world_size = buffer, seed, rank, world_size
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def batch(self, number: int) -> list[tuple[int, int]]:
        """(shard, sample within it) of each sample of batch `number`, counted from 0 over all epochs."""
        epoch, step = divmod(number, self.steps)
        places = []
        for position in range(step * self.per_batch, (step + 1) * self.per_batch):
            block, at = divmod(position, self._buffer)
            shard, sample = self._block(epoch, block)[at].tolist()
            places.append((shard, sample))
        return places

    def shards_ahead(self, number: int) -> list[int]:
        """The shards needed by the batch's blocks and the block after them, and one more shard, nearest
        first."""
        epoch, step = divmod(number, self.steps)
        first = step * self.per_batch // self._buffer
        last = ((step + 1) * self.per_batch - 1) // self._buffer
        shards = self._span(epoch, first * self._buffer, (last + 2) * self._buffer)
        if (last + 1) * self._buffer >= self.steps * self.per_batch:
            shards += self._span(epoch + 1, 0, self._buffer)
        return list(dict.fromkeys(shards))

    def _span(self, epoch: int, start: int, end: int) -> list[int]:
        """The shards of positions `start` to `end` within the share, and the share's next shard."""
        share_start, share_end = self._share(epoch)
        shards, ends = self._epoch(epoch)
        places = np.array([share_start + start, min(share_start + end, share_end) - 1, share_end - 1])
        first, last, last_of_share = np.searchsorted(ends, places, side="right").tolist()
        return shards[first : min(last + 1, last_of_share) + 1].tolist()

    def _block(self, epoch: int, block: int) -> np.ndarray:
        """(shard, sample within it), int64 [samples of the block, 2], shuffled."""
        return _get_or_make(self._blocks, (epoch, block),
                            lambda: self._shuffle_block(epoch, block), BLOCKS_KEPT)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        share_start, share_end = self._share(epoch)
        start = share_start + block * self._buffer
        rng = np.random.default_rng([self._seed[0], BLOCK, self._seed[1], epoch, share_start, block])
        positions = start + rng.permutation(min(self._buffer, share_end - start))
        shards, ends = self._epoch(epoch)
        which = np.searchsorted(ends, positions, side="right")
        return np.stack([shards[which], positions - ends[which] + self._counts[shards[which]]], axis=1)

    def _share(self, epoch: int) -> tuple[int, int]:
        """Start and end of the share among all samples of the epoch."""
        share = (self._rank + epoch) % self._world_size
        return self._samples * share // self._world_size, self._samples * (share + 1) // self._world_size

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the epoch's order, the same for every share, and the end of each among all
        samples."""

        def draw() -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([self._seed[0], SHARDS, self._seed[1], epoch])
            shards = rng.permutation(len(self._counts))
            return shards, np.cumsum(self._counts[shards])

        return _get_or_make(self._epochs, epoch, draw, EPOCHS_KEPT)


def _get_or_make(values: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """`values[key]`, made if it is missing. When there are more than `most` values, drop the oldest."""
    if key not in values:
        values[key] = make()
        if len(values) > most:
            values.popitem(last=False)
    return values[key]
