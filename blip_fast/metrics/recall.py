"""Recall at k of a retrieval (the share of queries with a right item among their k best), and the median
rank.

For each query the scores of some candidates are given; all other items of the gallery score at most
`elsewhere`. Ties count against the model: a wrong item with the score of the best right one ranks before it.
So a model that gives everything the same score, or NaN, has recall 0 rather than luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_RANKS = (1, 5, 10)


def right_ranks(scores: Tensor, right: Tensor, rights: Tensor, gallery: int,
                elsewhere: Tensor | float) -> Tensor:
    """The number of wrong items ranked before each query's best right one.

    Args:
        scores: [queries, candidates], higher is better.
        right: bool [queries, candidates].
        rights: int64 [queries], the number of right items in the whole gallery, at least 1.
        gallery: the number of items, candidates or not.
        elsewhere: [queries], or one for all: the score, or an upper bound of it, of items that are not
            candidates.

    Returns:
        int64 [queries]; 0 is a hit at rank 1.

    Raises:
        ValueError: the shapes differ, or a query has no right item.
    """
    if scores.shape != right.shape or scores.ndim != 2 or rights.shape != scores.shape[:1]:
        raise ValueError(f"scores and right must both be [queries, candidates], rights [queries], got "
                         f"{tuple(scores.shape)}, {tuple(right.shape)} and {tuple(rights.shape)}")
    if not bool((rights > 0).all()):
        query = int((rights <= 0).nonzero()[0])
        raise ValueError(f"query {query} has no right candidate: its recall is undefined, leave it out")
    elsewhere = torch.as_tensor(elsewhere, dtype=scores.dtype, device=scores.device).expand(len(scores))
    rights_elsewhere = rights - right.sum(dim=1)
    wrong_elsewhere = gallery - scores.shape[1] - rights_elsewhere
    outside = torch.where(rights_elsewhere > 0, elsewhere, float("-inf"))
    best = torch.cat([scores.masked_fill(~right, float("-inf")), outside[:, None]], dim=1).amax(dim=1)
    # "Not below" rather than "at or above", so that NaN ranks before everything.
    before = (~(scores < best[:, None]) & ~right).sum(dim=1)
    return before + wrong_elsewhere * ~(elsewhere < best)


def recalls(ranks: Tensor) -> dict[int, float]:
    """Recall at each of `RECALL_RANKS`, 0 to 1, from the result of `right_ranks`."""
    return {k: float((ranks < k).double().mean()) for k in RECALL_RANKS}


def median_rank(ranks: Tensor) -> float:
    """The median rank, 1 is best, from the result of `right_ranks`. For an even number of queries, the mean
    of the middle two."""
    return float(ranks.double().quantile(0.5)) + 1


def chance_recalls(rights: Tensor, gallery: int) -> dict[int, float]:
    """The expected recalls of a random order of the gallery. `rights`, int64 [queries], is as in
    `right_ranks`.

    A query with c right items among n misses at k with probability Π_{j<k} (n − c − j) / (n − j).
    """
    wrong = gallery - rights[:, None].double()
    drawn = torch.arange(max(RECALL_RANKS), device=rights.device)
    still_wrong = ((wrong - drawn).clamp_min(0) / (gallery - drawn).clamp_min(1)).cumprod(dim=1)
    return {k: float((1 - still_wrong[:, k - 1]).mean()) for k in RECALL_RANKS}
