"""VisDial's measures of how a dialogue round's candidate answers are ranked (Das et al. 2017; NDCG of the
challenge since 2018).

Ties count against the model, as in `recall.py`, and so does NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip_fast.metrics.recall import recalls, right_ranks


def dialog_figures(scores: Tensor, right: Tensor) -> dict[str, float]:
    """MRR, recalls and mean rank of the answer that was given.

    Args:
        scores: [rounds, candidates] (100 candidates in VisDial 1.0), higher is better.
        right: int64 [rounds], the place among the candidates of the answer that was given.

    Returns:
        `mrr`, the mean of 1 / rank; `r1`, `r5` and `r10`, 0 to 1; `mean_rank`, 1 is best.

    Raises:
        ValueError: there is no round, the shapes differ, or a place is out of range.
    """
    if scores.ndim != 2 or not len(scores) or right.shape != scores.shape[:1]:
        raise ValueError("scores must be [rounds, candidates] and right [rounds], with one round at least, "
                         f"got {tuple(scores.shape)} and {tuple(right.shape)}")
    if not 0 <= int(right.min()) <= int(right.max()) < scores.shape[1]:
        raise ValueError(f"right runs from {int(right.min())} to {int(right.max())}, "
                         f"but there are {scores.shape[1]} candidates")
    places = torch.arange(scores.shape[1], device=scores.device)
    ranks = right_ranks(scores, right[:, None] == places, torch.ones_like(right), scores.shape[1],
                        float("-inf"))
    return {"mrr": float((1 / (ranks + 1).double()).mean()),
            **{f"r{k}": value for k, value in recalls(ranks).items()},
            "mean_rank": float((ranks + 1).double().mean())}


def ndcg(scores: Tensor, relevance: Tensor) -> float:
    """Normalised discounted cumulative gain, the mean over rounds, 0 to 1.

    With k candidates of relevance above 0, DCG = Σ relevance / log₂(place + 1) over the first k places in the
    order of the scores. It is divided by the DCG of the best order. Of equal scores, the less relevant
    candidate comes first.

    Args:
        scores: [rounds, candidates], higher is better.
        relevance: of the same shape, 0 to 1: the share of people who found a candidate right.

    Raises:
        ValueError: there is no round, the shapes differ, or a round has no relevant candidate or a negative
            relevance.
    """
    if scores.ndim != 2 or not len(scores) or scores.shape != relevance.shape:
        raise ValueError("scores and relevance must both be [rounds, candidates], with one round at least, "
                         f"got {tuple(scores.shape)} and {tuple(relevance.shape)}")
    relevance = relevance.double()
    relevant = (relevance > 0).sum(dim=1)
    if not bool(relevant.all()) or not bool((relevance >= 0).all()):
        bad = int(((relevant == 0) | ~(relevance >= 0).all(dim=1)).nonzero()[0])
        raise ValueError(f"round {bad} has no relevant candidate or a negative relevance: "
                         "its NDCG is undefined, leave it out")
    unknown = torch.where(relevance > 0, float("-inf"), float("inf")).to(scores.dtype)
    scores = torch.where(scores.isnan(), unknown, scores)
    ascending, by_relevance = relevance.sort(dim=1, stable=True)
    order = scores.gather(1, by_relevance).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    discounts = (places < relevant[:, None]) / (places + 2).double().log2()
    found, best = ((gains * discounts).sum(dim=1)
                   for gains in (ascending.gather(1, order), ascending.flip(1)))
    return float((found / best).mean())
