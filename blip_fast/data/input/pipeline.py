"""From shards to batches: read, check, decode by DALI, crop, flip, RandAugment, normalise. With a GPU,
everything but reading runs on it.

`TrainInput` is endless training input: seeded, split into shares, mixed from sources and resumable at any
batch. `EvaluationInput` reads every image once, in order. Captions are returned as strings; training packs
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_fast.data.input.augment import Drawn, draw
from blip_fast.data.input.decoding import ReadBatch, decode
from blip_fast.data.input.order import Order
from blip_fast.data.input.reader import Damaged, Item, Shards, Sizes, SourceReader, read_item
from blip_fast.data.input.sources import Source, batch_shares, check_mix
from blip_fast.data.shards.shard_cache import CACHE, shard_cache
from blip_fast.data.shards.shards import OpenShard
from blip_fast.model.tokenizer import clean_caption

OPEN_SHARDS = 100  # most shards of a source within one shuffle buffer


@dataclass(frozen=True)
class InputConfig:
    """What is read, and how images and captions are prepared. The defaults are those of BLIP's
    pre-training."""

    sources: list[Source]
    image_size: int = 224
    batch_size: int = 32  # of each share
    crop_scale: tuple[float, float] | None = (0.2, 1.0)  # share of the area to keep; None: all of it
    flip: bool = True
    rand_augment: bool = True
    prompt: str = ""  # put before every caption, as in captioning's fine-tuning
    max_words: int = 30
    shuffle_buffer: int = 4096  # samples of a source that are shuffled together
    threads: int = 4
    seed: int = 0
    cache: str = CACHE  # of shards under URLs
    cache_gb: float = 100.0
    pairs: bool = False  # each sample is two images (NLVR2)

    def __post_init__(self) -> None:
        check_mix(self.sources)
        for name in ("image_size", "batch_size", "max_words", "shuffle_buffer", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}: "
                             "it must be (least, most) with 0 < least ≤ most ≤ 1")


class TrainInput:
    """Training batches of share `rank` of `world_size`. Iterating yields the rest of the current epoch;
    iterating again yields the next epoch.

    Every batch holds a fixed number of images of each source (`batch_shares`), grouped by source. Each source
    has its own epochs: in each it is read in another order, split evenly over the shares, and its last,
    partial batch is dropped. The input's epoch has as many batches as all samples fill (`steps_per_epoch`).
    With one source, or without weights, that is one epoch of each source, up to rounding; with weights some
    sources are seen more often, others less. An image that was damaged since it was packed is listed in
    `quarantine` and replaced by another image of its batch, from its own source if possible, so that every
    share keeps its shapes.

    Batch n is a function of the configuration, the data, the share and n alone. The random choices for a
    sample depend on the sample and its source's epoch. So n is all that needs to be stored.

    Raises FileNotFoundError, ValueError or OSError, before anything is read, for shards or sizes that cannot
    be trained on.
    """

    def __init__(self, config: InputConfig, *, rank: int = 0, world_size: int = 1,
                 device: str | torch.device = "cpu"):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} ranks: it must be 0 to {world_size - 1}")
        self.config, self.rank, self.world_size, self.device = config, rank, world_size, torch.device(device)
        shards = [Shards(source.root, shard_cache(config.cache, config.cache_gb))
                  for source in config.sources]
        samples = [each.index.samples for each in shards]
        shares = batch_shares(config.sources, samples, config.batch_size)
        self.steps_per_epoch = sum(samples) // world_size // config.batch_size
        self._pool = ThreadPoolExecutor(config.threads, "input")
        self._readers = [self._reader(i, shards[i], share) for i, share in enumerate(shares)]
        self._quarantine: dict[tuple[str, str], Damaged] = {}
        self._origin = self._everything_that_decides()
        self._taken = 0
        self._decoder = self._start()

    def _reader(self, number: int, shards: Shards, per_batch: int) -> SourceReader:
        config, name, index = self.config, self.config.sources[number].name, shards.index
        if index.without_caption:
            raise ValueError(f"source {name} holds {index.without_caption} images "
                             "without a caption to train on")
        if config.pairs and index.pairs < index.samples:
            raise ValueError(f"source {name} holds {index.samples - index.pairs} samples without a second "
                             'image: pack rows with "image" and "second_image"')
        if index.samples // self.world_size < per_batch:
            raise ValueError(f"source {name}: {index.samples} images give {self.world_size} ranks no full "
                             f"batch of {per_batch}")
        # Buffers in proportion, so that all sources together hold about one shuffle buffer.
        buffer = -(-config.shuffle_buffer * per_batch // config.batch_size)
        if min(buffer / index.samples, 1) * len(index.shards) > OPEN_SHARDS:
            raise ValueError(f"source {name}: a shuffle_buffer of {config.shuffle_buffer} spans more than "
                             f"{OPEN_SHARDS} shards: pack more samples into each (--samples-per-shard)")
        counts, seed = [shard.samples for shard in index.shards], (config.seed, number)
        order = Order(counts, per_batch, buffer, seed, self.rank, self.world_size)
        return SourceReader(name, shards, order, self._draw, seed, self._pool, config.pairs)

    def _draw(self, record: dict[str, Any], sizes: Sizes,
              rng: np.random.Generator) -> tuple[list[Drawn], str, str]:
        config, captions, caption, origin = self.config, record["captions"], "", ""
        if captions:
            which = rng.integers(len(captions))
            caption = config.prompt + clean_caption(captions[which], config.max_words)
            origin = record["origins"][which] if "origins" in record else ""
        drawn = [draw(rng, *size, config.crop_scale, config.flip, config.rand_augment) for size in sizes]
        return drawn, caption, origin

    @property
    def epoch(self) -> int:
        return self._taken // self.steps_per_epoch

    @property
    def step(self) -> int:
        """Batches taken of the current epoch."""
        return self._taken % self.steps_per_epoch

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """The damaged samples found so far: source, image, key, reason."""
        return [asdict(damaged) for damaged in self._quarantine.values()]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[ReadBatch]:
        epoch = self.epoch
        while self.epoch == epoch:
            batch = next(self._decoder)
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """This share's position, to be saved with `torch.save`. It fits only the same data, shares and
        options."""
        return {"batches": self._taken, "origin": self._origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken. The remaining batches are exactly the same.

        Raises ValueError naming what differs.
        """
        origin = self._origin
        names = [*origin, *(name for name in state["origin"] if name not in origin)]
        if differing := [name for name in names if origin.get(name) != state["origin"].get(name)]:
            changes = ", ".join(f"{name} was {state['origin'].get(name)}, is {origin.get(name)}"
                                for name in differing)
            raise ValueError(f"the input's position cannot be restored: {changes}")
        self._taken = state["batches"]
        self._decoder = self._start()

    def _everything_that_decides(self) -> dict[str, Any]:
        """Everything that the order of images and the random choices depend on. The location of shards is not
        part of it."""
        left_out = ("sources", "threads", "cache", "cache_gb")
        options = {name: value for name, value in asdict(self.config).items() if name not in left_out}
        origin = {**options, "rank": self.rank, "world_size": self.world_size,
                  "sources": ", ".join(source.name for source in self.config.sources)}
        for reader in self._readers:
            content = "".join(shard.sha256 for shard in reader.shards.index.shards)
            origin[f"{reader.name}'s shards"] = hashlib.sha256(content.encode()).hexdigest()
            origin[f"{reader.name}'s images of a batch"] = reader.order.per_batch
        return origin

    def _start(self) -> Iterator[ReadBatch]:
        config = self.config
        items = (self.items(number) for number in count(self._taken))
        images = config.batch_size * (1 + config.pairs)
        return decode(items, config.image_size, images, config.rand_augment, config.threads, self.device)

    def items(self, number: int) -> list[Item]:
        """The samples of batch `number`, counted from 0 over all epochs, not yet decoded. A damaged sample is
        replaced by the first good one of its source, or else of the batch."""
        found = [(reader.name, item) for reader in self._readers for item in reader.batch(number)]
        good = [item for _, item in found if isinstance(item, Item)]
        items = []
        for source, item in found:
            if isinstance(item, Damaged):
                self._quarantine[source, item.key] = item
                if not good:
                    raise RuntimeError(f"every image of a batch is damaged, {item.key} the first: "
                                       "pack them again")
                item = next((other for other in good if other.source == source), good[0])
            items.append(item)
        return items


class EvaluationInput:
    """Every image once, in order, resized and normalised (within 2/255 of Pillow's bicubic), divided among
    the ranks.

    `shards` is a directory or URL. Damaged images are left out and listed in `quarantine`; the last batch may
    be smaller. `captions` holds each image's first caption, unchanged; all captions are in `records`.
    `sources` repeats `shards`.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        image_size: int,
        batch_size: int,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        cache: str = CACHE,
        cache_gb: float = 100.0,
    ):
        self._shards, self._name = Shards(shards, shard_cache(cache, cache_gb)), str(shards)
        all_samples = self._shards.index.samples
        self._first, last = (all_samples * r // world_size for r in (rank, rank + 1))
        self.samples = last - self._first
        self.batch_size, self.quarantine = batch_size, list[dict[str, str]]()
        self._image_size, self._device = image_size, torch.device(device)
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, "input")

    def __iter__(self) -> Iterator[ReadBatch]:
        return decode(self._items(), self._image_size, self.batch_size, False, self._threads, self._device)

    def _items(self) -> Iterator[list[Item]]:
        ends = np.cumsum([shard.samples for shard in self._shards.index.shards])
        for start in range(self._first, self._first + self.samples, self.batch_size):
            positions = np.arange(start, min(start + self.batch_size, self._first + self.samples))
            shards = np.searchsorted(ends, positions, side="right")
            self._shards.want(range(shards[0], min(shards[-1] + 2, len(ends))))
            numbers = (positions - ends[shards]
                       + [self._shards.index.shards[shard].samples for shard in shards])
            places = zip(shards.tolist(), numbers.tolist(), strict=True)
            found = list(self._pool.map(self._item,
                                        *zip(*((self._shards[s], n) for s, n in places), strict=True)))
            for damaged in found:
                if isinstance(damaged, Damaged) and asdict(damaged) not in self.quarantine:
                    self.quarantine.append(asdict(damaged))
            if items := [item for item in found if isinstance(item, Item)]:
                yield items

    def _item(self, opened: OpenShard, number: int) -> Item | Damaged:
        return read_item(opened, number, self._name, _whole_image)


def _whole_image(record: dict[str, Any], sizes: Sizes) -> tuple[list[Drawn], str, str]:
    """The whole image, its first caption and the caption's origin."""
    caption, origin = (next(iter(record.get(name, ())), "") for name in ("captions", "origins"))
    return [Drawn((0, 0), size) for size in sizes], caption, origin
