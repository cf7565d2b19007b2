"""The data sets that training mixes, and the number of images of each in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One data set: shards in a directory or under any fsspec URL (`s3://`, `gs://`, `https://`, …). Each of
    its samples carries `name`. `weight` is its part of every batch, relative to the other sources' weights.
    Without weights, a source's part of a batch is its part of all samples."""

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
    """Raise ValueError if sources cannot be mixed: there is none, two have the same name, or only some have a
    weight."""
    if not sources:
        raise ValueError("there is no source: name at least one with its shards")
    names = [source.name for source in sources]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources must have different names: {', '.join(doubled)} stands twice")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"sources {', '.join(without)} have no weight and others do: "
                         "give all of them one, or none")


def batch_shares(sources: Sequence[Source], samples: Sequence[int], batch_size: int) -> list[int]:
    """The number of images of each source in every batch: weight × batch_size, rounded by largest remainder.

    Args:
        samples: the number of samples of each source, used as its weight if it has none.

    Raises ValueError if a source would get no image.
    """
    weights = [source.weight or count for source, count in zip(sources, samples, strict=True)]
    exact = [batch_size * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: batch_size - sum(shares)]:
        shares[i] += 1
    for source, share, wanted in zip(sources, shares, exact, strict=True):
        if share == 0:
            raise ValueError(f"source {source.name} has {wanted:.2g} images of a batch of {batch_size}, "
                             "rounded to none: take larger batches, raise its weight or leave it out")
    return shares
