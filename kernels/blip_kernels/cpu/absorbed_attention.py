"""Attention of one step of generation over states, without computing keys and values. For CPUs; no gradient.

    k = s wᵏᵀ + bᵏ,  v = s wᵛᵀ + bᵛ                                keys and values of states s, never computed
    out[r] = softmax(scale · q[r] kᵀ) v = (softmax(scale · (q[r] wᵏ) sᵀ) s) wᵛᵀ + bᵛ

The projections move from the many states to the few queries (DeepSeek-V2, arXiv 2405.04434, section 2.1). bᵏ
adds the same number to all logits of a query, which does not change the softmax. One query costs 1 / head_dim
of projecting all states. A step reads the states, which fit a cache, instead of keys and values of every
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip_kernels.cpu.products import matmul

# Rows of each product with a head's weight. The number is fixed because a row's bits depend on it.
ROWS_TOGETHER = 24


def absorbed_attention(q: Tensor, states: Tensor, lengths: Tensor, key_weight: Tensor, value_weight: Tensor,
                       value_bias: Tensor, scale: float) -> Tensor:
    """Attention in which each segment of states is read by the same number of consecutive query rows.

    A row's result has the same bits whatever the number of segments.

    Args:
        q: [rows, heads, head_dim]; row r reads segment r // (rows / segments).
        states: [segments, keys, width], same dtype as `q`. All values must be finite.
        lengths: int32 [segments]: how many of its states each segment uses, 1 to all.
        key_weight: [heads, head_dim, width].
        value_weight: [heads, width, head_dim], each head's weight transposed, so that it is read in rows.
        value_bias: [heads, head_dim].
        scale: factor of the logits.

    Returns:
        [rows, heads, head_dim] in `q`'s dtype.
    """
    segments, keys, width = states.shape
    heads, each = q.shape[1], len(q) // segments
    asked = _by_head((q * scale).transpose(0, 1), key_weight)  # [heads, rows, width]
    asked = asked.unflatten(1, (segments, each)).movedim(0, 2).reshape(segments, each * heads, width)
    if alone := segments == 1:  # PyTorch computes a batch of one in another way than larger ones
        asked, states = asked.expand(2, -1, -1), states.expand(2, -1, -1)
    logits = matmul(asked, states.transpose(1, 2)).float()
    if int(lengths.min()) < keys:
        outside = torch.arange(keys) >= lengths[:, None, None]
        logits.masked_fill_(outside, -torch.inf)
    seen = matmul(torch.softmax(logits, -1).to(q.dtype), states)[: 1 if alone else None]
    seen = seen.unflatten(1, (each, heads)).movedim(2, 0).reshape(heads, len(q), width)
    return (_by_head(seen, value_weight) + value_bias[:, None]).transpose(0, 1)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [heads, rows, in], weight [heads, in, out] → [heads, rows, out]."""
    rows = x.shape[1]
    if lacking := -rows % ROWS_TOGETHER:
        x = torch.cat([x, x[:, -1:].expand(-1, lacking, -1)], dim=1)
    parts = [matmul(part, weight) for part in x.split(ROWS_TOGETHER, dim=1)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, :rows]
