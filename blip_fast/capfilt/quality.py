"""How well a filter finds planted noise, when it is known which captions are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FilterQuality:
    """Two views of one decision per web caption, each 0 to 1.

    Removal, if the aim is to find wrong captions: `removal_precision` is the share of wrong captions among
    the removed ones, `removal_recall` the share of removed captions among the wrong ones. Keeping, if the aim
    is to find right captions: `keeping_precision` is the share of right captions among the kept ones,
    `keeping_recall` the share of kept captions among the right ones. A share of nothing (nothing removed,
    nothing kept) counts as 0.

    `chance_*` is the expected value when as many captions are removed at random.
    """

    removal_precision: float
    removal_recall: float
    keeping_precision: float
    keeping_recall: float
    chance_removal_precision: float
    chance_removal_recall: float
    chance_keeping_precision: float
    chance_keeping_recall: float


def filter_quality(kept: Sequence[bool], right: Sequence[bool]) -> FilterQuality:
    """Compare which web captions were kept with which are right.

    Raises ValueError if the two differ in length, or if all captions are right or all are wrong, since a
    recall is then undefined.
    """
    if len(kept) != len(right):
        raise ValueError(f"kept and right must be of the same captions, got {len(kept)} and {len(right)}")
    if all(right) or not any(right):
        raise ValueError(f"of {len(right)} captions {sum(right)} are right: "
                         "there must be right and wrong ones")
    total, n_kept, n_right = len(kept), sum(kept), sum(right)
    kept_right = sum(k and r for k, r in zip(kept, right, strict=True))
    removed_wrong = total - n_kept - (n_right - kept_right)
    return FilterQuality(
        removal_precision=_share(removed_wrong, total - n_kept),
        removal_recall=_share(removed_wrong, total - n_right),
        keeping_precision=_share(kept_right, n_kept),
        keeping_recall=_share(kept_right, n_right),
        chance_removal_precision=_share(total - n_right, total) if n_kept < total else 0.0,
        chance_removal_recall=_share(total - n_kept, total),
        chance_keeping_precision=_share(n_right, total) if n_kept else 0.0,
        chance_keeping_recall=_share(n_kept, total),
    )


def calibrated_threshold(clean: Sequence[float], keep: float) -> float:
    """The highest threshold of ITM's probability that keeps a share of clean pairs.

    A filter answers 'matched' too easily on captions that are wrong in one word. Pairs known to be right show
    how high the threshold may be.

    Args:
        clean: ITM probabilities of right pairs that the filter was not trained on.
        keep: the share of them that must pass, 0 to 1.

    Raises:
        ValueError: there is no pair, or `keep` is not a share.
    """
    if not clean or not 0.0 < keep <= 1.0:
        raise ValueError("calibration needs clean pairs and a share to keep in (0, 1], "
                         f"got {len(clean)} and {keep}")
    # Round first: the product may be a hair above a whole number.
    kept = math.ceil(round(keep * len(clean), 9))
    return sorted(clean, reverse=True)[kept - 1]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
