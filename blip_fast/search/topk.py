"""Exact top-k rows of a matrix larger than memory, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def top_rows(blocks: Iterable[tuple[int, NDArray]], query: NDArray, count: int,
             holes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `count` rows with the largest products with the query, largest first. Of equal products the earlier
    row comes first.

    Products are summed in float64 and rounded to float32. So equal rows tie in whichever block they are, and
    the result is that of one pass over all rows.

    Args:
        blocks: (number of the block's first row, float [rows, width]), in order.
        query: float [width].
        count: the number of rows wanted; fewer are returned if the blocks hold fewer.
        holes: rows to ignore, sorted.

    Returns:
        (row numbers, products).
    """
    query = query.astype(np.float64)
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for first, block in blocks:
        products = (block.astype(np.float64) @ query).astype(np.float32)
        low, high = np.searchsorted(holes, [first, first + len(block)])
        products[holes[low:high] - first] = -np.inf
        # A later row must be strictly better than the worst kept row: on a tie the earlier row wins.
        better = np.flatnonzero(products > (scores[-1] if len(scores) == count > 0 else -np.inf))
        rows = np.concatenate([rows, better + first])
        scores = np.concatenate([scores, products[better]])
        best = np.argsort(-scores, kind="stable")[:count]
        rows, scores = rows[best], scores[best]
    return rows, scores
