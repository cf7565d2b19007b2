"""Recall at k of a retrieval: the share of queries with a right candidate among their k best.

Ties count against the model: a wrong candidate that scores as high as the best right one stands before it. A model
that scores everything alike, or NaN, thus has recall 0 and not luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_RANKS = (1, 5, 10)


def right_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates stand before each query's best right one.

    Args:
        scores: [queries, candidates], higher is better.
        right: bool [queries, candidates]; every query has a right candidate.

    Returns:
        int64 [queries]; 0 is a hit at rank 1.

    Raises:
        ValueError: the shapes differ, or a query has no right candidate.
    """
    if scores.shape != right.shape or scores.ndim != 2:
        raise ValueError(f"scores and right must both be [queries, candidates], got {tuple(scores.shape)} and "
                         f"{tuple(right.shape)}")
    if not bool(right.any(dim=1).all()):
        query = int((~right.any(dim=1)).nonzero()[0])
        raise ValueError(f"query {query} has no right candidate: its recall is undefined, leave it out")
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)  # not below, rather than at or above: a NaN stands before everything


def recalls(scores: Tensor, right: Tensor) -> dict[int, float]:
    """Recall at each of `RECALL_RANKS`, 0 to 1. Arguments and errors as `right_ranks`."""
    ranks = right_ranks(scores, right)
    return {k: float((ranks < k).double().mean()) for k in RECALL_RANKS}


def chance_recalls(right: Tensor) -> dict[int, float]:
    """The recalls that a random order of the candidates is expected to have.

    A query with c right ones among n candidates misses at k with probability Π_{j<k} (n − c − j) / (n − j).
    """
    candidates = right.shape[1]
    wrong = candidates - right.sum(dim=1, keepdim=True).double()
    drawn = torch.arange(max(RECALL_RANKS), device=right.device)
    still_wrong = ((wrong - drawn).clamp_min(0) / (candidates - drawn).clamp_min(1)).cumprod(dim=1)
    return {k: float((1 - still_wrong[:, k - 1]).mean()) for k in RECALL_RANKS}
