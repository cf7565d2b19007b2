"""The data sets that training mixes, and how many images of each a batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One data set: shards in a directory or under any fsspec URL (`s3://`, `gs://`, `https://`, …). `name` stays with
    each of its samples. `weight` is its part of every batch, compared with the other sources' weights; without weights
    each source has the part that its samples have of all."""

    name: str
    root: str
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a source's name is {self.name!r}: give it one, without a slash")
        if not self.root:
            raise ValueError(f"source {self.name} has no root: name its directory or URL")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"the weight of source {self.name} is {self.weight}: it must be more than 0")


def check_mix(sources: Sequence[Source]) -> None:
    """Raise ValueError where sources cannot be mixed: none, two of one name, or weights for some only."""
    if not sources:
        raise ValueError("there is no source: name at least one with its shards")
    names = [source.name for source in sources]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources must have different names: {', '.join(doubled)} stands twice")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"sources {', '.join(without)} have no weight and others do: give all of them one, or none")


def batch_shares(sources: Sequence[Source], samples: Sequence[int], batch_size: int) -> list[int]:
    """How many images of each source every batch holds: weight × batch_size by largest remainder.

    Args:
        samples: of each source; they are the weights where none is given.

    Raises ValueError where a source's share would be nothing.
    """
    weights = [source.weight or count for source, count in zip(sources, samples, strict=True)]
    exact = [batch_size * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: batch_size - sum(shares)]:
        shares[i] += 1
    for source, share, wanted in zip(sources, shares, exact, strict=True):
        if share == 0:
            raise ValueError(f"source {source.name} has {wanted:.2g} images of a batch of {batch_size}, rounded to "
                             "none: take larger batches, raise its weight or leave it out")
    return shares
