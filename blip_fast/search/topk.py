"""The best rows of a matrix that is larger than memory, exactly, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def top_rows(blocks: Iterable[tuple[int, NDArray]], query: NDArray, count: int,
             holes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `count` rows with the largest products with the query, the largest first; of equal ones the earlier row.

    Products are summed in float64 and rounded to float32: equal rows then tie wherever they stand, and the result is
    that of one pass over all rows.

    Args:
        blocks: (number of its first row, float [rows, width]), in order.
        query: float [width].
        count: rows wanted; there are fewer where the blocks hold fewer.
        holes: rows that count for nothing, sorted.

    Returns:
        (row numbers, products).
    """
    query = query.astype(np.float64)
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for first, block in blocks:
        products = (block.astype(np.float64) @ query).astype(np.float32)
        low, high = np.searchsorted(holes, [first, first + len(block)])
        products[holes[low:high] - first] = -np.inf
        # A later row must be better than the last of the best: what equals it stands behind it.
        better = np.flatnonzero(products > (scores[-1] if len(scores) == count > 0 else -np.inf))
        rows = np.concatenate([rows, better + first])
        scores = np.concatenate([scores, products[better]])
        best = np.argsort(-scores, kind="stable")[:count]
        rows, scores = rows[best], scores[best]
    return rows, scores
