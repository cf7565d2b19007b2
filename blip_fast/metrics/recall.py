"""Recall at k of a retrieval, the share of queries with a right item among their k best, and the median rank.

Of each query the scores of some candidates are given; all other items of the gallery score no more than `elsewhere`.
Ties count against the model: a wrong item that scores as high as the best right one stands before it. A model that
scores everything alike, or NaN, thus has recall 0 and not luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_RANKS = (1, 5, 10)


def right_ranks(scores: Tensor, right: Tensor, rights: Tensor, gallery: int, elsewhere: Tensor | float) -> Tensor:
    """How many wrong items stand before each query's best right one.

    Args:
        scores: [queries, candidates], higher is better.
        right: bool [queries, candidates].
        rights: int64 [queries], right items in the whole gallery; every query has one.
        gallery: how many items there are, candidates or not.
        elsewhere: [queries] or one for all: the score, or the highest possible, of items that are no candidates.

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
    # Not below, rather than at or above: a NaN stands before everything.
    before = (~(scores < best[:, None]) & ~right).sum(dim=1)
    return before + wrong_elsewhere * ~(elsewhere < best)


def recalls(ranks: Tensor) -> dict[int, float]:
    """Recall at each of `RECALL_RANKS`, 0 to 1, of `right_ranks`' result."""
    return {k: float((ranks < k).double().mean()) for k in RECALL_RANKS}


def median_rank(ranks: Tensor) -> float:
    """The median of `right_ranks`' result, 1 is best; of an even number of queries the mean of the middle two."""
    return float(ranks.double().quantile(0.5)) + 1


def chance_recalls(rights: Tensor, gallery: int) -> dict[int, float]:
    """The recalls that a random order of the gallery is expected to have, `rights` int64 [queries] as above.

    A query with c right ones among n items misses at k with probability Π_{j<k} (n − c − j) / (n − j).
    """
    wrong = gallery - rights[:, None].double()
    drawn = torch.arange(max(RECALL_RANKS), device=rights.device)
    still_wrong = ((wrong - drawn).clamp_min(0) / (gallery - drawn).clamp_min(1)).cumprod(dim=1)
    return {k: float((1 - still_wrong[:, k - 1]).mean()) for k in RECALL_RANKS}
