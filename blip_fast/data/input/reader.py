"""Samples from local or remote shards, checked, in the order given by `order.py`. Shards are opened shortly
before they are needed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip_fast.data.input.augment import Drawn
from blip_fast.data.input.order import SAMPLE, Order
from blip_fast.data.shards.integrity import image_size
from blip_fast.data.shards.shard_cache import ShardCache
from blip_fast.data.shards.shards import OpenShard, is_url, read_index

Sizes = list[tuple[int, int]]
Draw = Callable[[dict[str, Any], Sizes, np.random.Generator], tuple[list[Drawn], str, str]]
OPENING = 2  # shards that are fetched and opened ahead at the same time


@dataclass(frozen=True)
class Item:
    """An undamaged sample: one image or a pair, the random choices for each image, the caption, and the
    caption's origin if the record has it."""

    encoded: list[np.ndarray]  # uint8 [bytes]
    record: dict[str, Any]
    source: str
    drawn: list[Drawn]
    caption: str
    origin: str


@dataclass(frozen=True)
class Damaged:
    """A sample that changed since it was packed, as the quarantine lists it."""

    source: str
    image: str
    key: str
    reason: str


def read_item(
    shard: OpenShard, number: int, source: str,
    draw: Callable[[dict[str, Any], Sizes], tuple[list[Drawn], str, str]], pair: bool = False,
) -> Item | Damaged:
    """Read a sample (both images of a `pair`) and compare checksums: a damaged image must not reach the
    decoder, where the whole batch would fail. `draw` receives the record and each image's (height, width)."""
    contents, text = shard.read(number, pair)
    try:
        record = json.loads(text)
        packed = [record[name] for name in ("crc32", *["second_crc32"] * pair)]
    except (ValueError, TypeError, KeyError):
        where = f"{shard.name}, sample {number}"
        return Damaged(source, where, where, "damaged since it was packed: its record cannot be read")
    if [zlib.crc32(content) for content in contents] != packed:
        return Damaged(source, record["image"], record["key"],
                       "damaged since it was packed: its checksum differs")
    sizes = [(height, width) for width, height in map(image_size, contents)]
    encoded = [np.frombuffer(content, dtype=np.uint8) for content in contents]
    return Item(encoded, record, source, *draw(record, sizes))


class Shards:
    """The shards of a directory or URL; only the ones that are wanted are open.

    Raises what `read_index` raises; opening raises what `ShardCache.open` raises.
    """

    def __init__(self, root: str | Path, cache: ShardCache) -> None:
        self.index = read_index(root)
        self._root, self._cache = root, cache
        self._open: dict[int, Future[OpenShard]] = {}
        self._pool = ThreadPoolExecutor(OPENING, "shards")

    def want(self, numbers: Iterable[int]) -> None:
        """Close all other shards and open the first of these ahead, in threads. Give the nearest first."""
        wanted = list(numbers)
        for number in self._open.keys() - set(wanted):
            if self._open[number].done():
                future = self._open.pop(number)
                if future.exception() is None:
                    future.result().close()
        opening = sum(not future.done() for future in self._open.values())
        for number in [number for number in wanted if number not in self._open][: OPENING - opening]:
            self._open[number] = self._pool.submit(self._open_shard, number)

    def __getitem__(self, number: int) -> OpenShard:
        if number not in self._open:
            self._open[number] = self._pool.submit(self._open_shard, number)
        return self._open[number].result()

    def _open_shard(self, number: int) -> OpenShard:
        shard = self.index.shards[number]
        if is_url(self._root):
            return self._cache.open(f"{str(self._root).rstrip('/')}/{shard.file}", shard)
        return OpenShard(Path(self._root) / shard.file, shard.file)


class SourceReader:
    """Reads one source's samples of each batch of one share.

    Args:
        draw: receives a sample's record, each image's (height, width) and the sample's own random generator;
            returns the random choices for each image, the sample's caption and its origin ("" if unknown).
        seed: of the run and of the source, two words.
        pool: threads that read the samples of a batch.
        pairs: samples are two images each.
    """

    def __init__(
        self, name: str, shards: Shards, order: Order, draw: Draw, seed: tuple[int, int],
        pool: ThreadPoolExecutor, pairs: bool,
    ) -> None:
        self.name, self.shards, self.order = name, shards, order
        self._draw, self._seed, self._pool, self._pairs = draw, seed, pool, pairs

    def batch(self, number: int) -> list[Item | Damaged]:
        self.shards.want(self.order.shards_ahead(number))
        places = self.order.batch(number)
        opened = {shard: self.shards[shard] for shard in dict.fromkeys(shard for shard, _ in places)}
        epoch = number // self.order.steps
        return list(self._pool.map(lambda place: self._item(opened[place[0]], epoch, *place), places))

    def _item(self, opened: OpenShard, epoch: int, shard: int, sample: int) -> Item | Damaged:
        rng = np.random.default_rng([self._seed[0], SAMPLE, self._seed[1], epoch, shard, sample])
        return read_item(opened, sample, self.name,
                         lambda record, sizes: self._draw(record, sizes, rng), self._pairs)
