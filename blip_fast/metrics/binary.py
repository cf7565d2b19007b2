"""How well scores separate yes from no: accuracy and the area under the ROC curve."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(scores: Tensor, truth: Tensor) -> float:
    """The share of cases that are right, given probabilities [cases] and truth bool [cases]. Above a half is
    yes; NaN is always wrong. Raises ValueError if there is no case or the shapes differ."""
    _check(scores, truth)
    return float(torch.where(truth, scores > 0.5, scores <= 0.5).double().mean())


def area_under_roc(scores: Tensor, truth: Tensor) -> float:
    """The probability that a true case scores higher than a false one, with ties counted half (Mann and
    Whitney 1947). Computed from sums of ranks, without a table of all pairs.

    Raises ValueError as in `accuracy`, and if all cases are true, all are false, or a score is NaN.
    """
    _check(scores, truth)
    positives = int(truth.sum())
    if positives in (0, len(truth)):
        raise ValueError("the area under the ROC curve needs cases of both kinds")
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN: it has no place in an order")
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # from 1; equal scores share their mean rank
    below = float(ranks[truth].double().sum()) - positives * (positives + 1) / 2
    return below / (positives * (len(truth) - positives))


def _check(scores: Tensor, truth: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != truth.shape or not len(scores):
        raise ValueError("scores and truth must both be [cases], one case at least, "
                         f"got {list(scores.shape)} and {list(truth.shape)}")
