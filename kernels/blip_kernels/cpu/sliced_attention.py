"""Attention on a CPU in cache-sized slices: a few heads at a time, by plain matrix products.

In 16-bit types PyTorch's fused CPU attention is slow, especially its backward. Matrix products over slices
whose weights stay in the cache are several times faster. The backward recomputes the weights, so nothing of
size queries × keys outlives a slice.

    weights = softmax((scale · q) kᵀ),  out = dropout(weights) v
    d logits = weights · (d weights − Σ weights · d weights)
    dq = scale · d logits k,  dk = d logitsᵀ (scale · q)

The scale multiplies the queries, not the logits, which are keys / head_dim times as large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_ELEMENTS = 1 << 20  # attention weights of one slice: 2 MiB in bfloat16


class SlicedAttention(torch.autograd.Function):
    """`apply(q, k, v, mask, dropout, scale)` with q [segments, heads, queries, head_dim], k and v likewise.

    `mask` is bool, broadcast to [segments, heads, queries, keys], True where a query may look, or None.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float,  # type: ignore[override]
                scale: float) -> Tensor:
        seed = int(torch.randint(2**62, ())) if dropout else 0
        ctx.save_for_backward(q, k, v, mask)
        ctx.dropout, ctx.scale, ctx.seed = dropout, scale, seed
        q, k, v = _scaled(q, scale), k.contiguous(), v.contiguous()
        # Rows before heads in memory.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for number, part in enumerate(_slices(q, k)):
            weights = _weights(q[part], k[part], mask, part)
            if dropout:
                weights = weights * _dropout_factors(weights, dropout, seed + number)
            out[part] = weights @ v[part]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        *saved, mask = ctx.saved_tensors
        q, k, v = saved
        q, k, v, grad = _scaled(q, ctx.scale), k.contiguous(), v.contiguous(), grad.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for number, part in enumerate(_slices(q, k)):
            weights = _weights(q[part], k[part], mask, part)
            d_weights = grad[part] @ v[part].transpose(-1, -2)
            dropped = weights
            if ctx.dropout:
                kept = _dropout_factors(weights, ctx.dropout, ctx.seed + number)
                dropped, d_weights = weights * kept, d_weights * kept
            dv[part] = dropped.transpose(-1, -2) @ grad[part]
            d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq[part] = (d_logits @ k[part]).mul_(ctx.scale)
            dk[part] = d_logits.transpose(-1, -2) @ q[part]
        return dq, dk, dv, None, None, None


def _slices(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (segments, heads) whose weights fit a slice: several segments, or some heads of one segment."""
    segments, heads = q.shape[:2]
    room = max(SLICE_ELEMENTS // (q.shape[2] * k.shape[2]), 1)
    per_heads = min(heads, room)
    per_segments = max(room // heads, 1)
    for segment in range(0, segments, per_segments):
        for head in range(0, heads, per_heads):
            yield slice(segment, segment + per_segments), slice(head, head + per_heads)


def _scaled(q: Tensor, scale: float) -> Tensor:
    """Return scale · q, contiguous as k and v: one copy here instead of one in each slice's product."""
    return q.contiguous().mul(scale)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, part: tuple[slice, slice]) -> Tensor:
    """Return the attention weights of one slice [segments, heads, queries, keys]; q must be scaled."""
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        # The smallest number, not −∞, so that a row that may look nowhere gets no NaN. The caller sets its
        # output to 0.
        logits.masked_fill_(~mask[part[0]], torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1)


def _dropout_factors(weights: Tensor, dropout: float, seed: int) -> Tensor:
    """1 / (1 − dropout) where a weight stays, 0 where it is dropped; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
