"""Attention over segments by implementations that need rectangular batches. On a CPU attention runs this way.

Segments are padded into a batch; if their lengths are equal, the batch is a view and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.cpu.products import is_slow
from blip_kernels.cpu.sliced_attention import SlicedAttention

# (q, k, v [segments, heads, tokens, head_dim], mask or None, causal, dropout, scale) → as q
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, float], Tensor]


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys], True where a query may look: the last query sees every key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def padded_attention(core: Core, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor,
                      causal: bool, dropout: float, scale: float) -> Tensor:
    """Pad segments into a batch for `core`; with equal lengths the batch is a view and costs nothing."""
    q_lengths, kv_lengths = q_offsets.diff(), kv_offsets.diff()
    longest_q, longest_kv = int(q_lengths.max()), int(kv_lengths.max())
    if longest_q == 0 or longest_kv == 0:
        return torch.zeros_like(q)
    q_ragged = longest_q * len(q_lengths) != q.shape[0]
    kv_ragged = longest_kv * len(kv_lengths) != k.shape[0]
    q_places = _places(q_offsets, q_lengths, longest_q) if q_ragged else None
    kv_places = q_places if kv_offsets is q_offsets else (
        _places(kv_offsets, kv_lengths, longest_kv) if kv_ragged else None)
    q_batch = _pad(q, len(q_lengths), longest_q, q_places)
    k_batch = _pad(k, len(kv_lengths), longest_kv, kv_places)
    v_batch = _pad(v, len(kv_lengths), longest_kv, kv_places)

    # With equal query and key segments the causal mask alone hides padded keys, which come after the real
    # rows.
    same_segments = kv_offsets is q_offsets or torch.equal(q_offsets, kv_offsets)
    mask = None
    if causal and not same_segments:
        mask = _ragged_causal_mask(q_lengths, kv_lengths, longest_q, longest_kv)
    elif kv_ragged and not causal:
        mask = (torch.arange(longest_kv, device=q.device) < kv_lengths[:, None])[:, None, None, :]
    out = core(q_batch, k_batch, v_batch, mask, causal and same_segments, dropout, scale)
    rows = out.transpose(1, 2).reshape(-1, *q.shape[1:])
    if q_places is not None:
        rows = _Unpad.apply(rows, q_places)
    if mask is not None and bool((kv_lengths == 0).any()):
        empty = torch.repeat_interleave(kv_lengths == 0, q_lengths.long())
        rows = rows.masked_fill(empty[:, None, None], 0.0)
    return rows


def _ragged_causal_mask(q_lengths: Tensor, kv_lengths: Tensor, longest_q: int, longest_kv: int) -> Tensor:
    """Return a mask [segments, 1, longest_q, longest_kv], aligned bottom right in each segment."""
    queries = torch.arange(longest_q, device=q_lengths.device)[None, :, None]
    keys = torch.arange(longest_kv, device=q_lengths.device)[None, None, :]
    ends = queries + (kv_lengths - q_lengths)[:, None, None]
    return ((keys <= ends) & (keys < kv_lengths[:, None, None]))[:, None]


def _places(offsets: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Return the index of each packed row in the padded batch [segments × longest], int64 [rows]."""
    shift = torch.arange(len(lengths), device=offsets.device) * longest - offsets[:-1]
    return torch.arange(int(offsets[-1]),
                        device=offsets.device) + torch.repeat_interleave(shift, lengths.long())


def _pad(x: Tensor, segments: int, longest: int, places: Tensor | None) -> Tensor:
    """[rows, heads, head_dim] → [segments, heads, longest, head_dim], with zeros after shorter segments."""
    rows = x if places is None else _Pad.apply(x, places, segments * longest)
    return rows.reshape(segments, longest, *x.shape[1:]).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """Copy rows to their places in a padded batch. Places are unique, so the gradient is a plain gather."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, padded_rows: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        return x.new_zeros(padded_rows, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`; its gradient is `_Pad`'s forward."""

    @staticmethod
    def forward(ctx, padded: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        ctx.padded_rows = padded.shape[0]
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.new_zeros(ctx.padded_rows,
                              *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float,
         scale: float) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu":  # without these copies, strided rows of a head cost it a quarter more time
        wide = torch.float32 if is_slow(q) else dtype
        q, k, v = (x.to(wide).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal,
                                          scale=scale).to(dtype)


def sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float,
           scale: float) -> Tensor:
    if causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device).expand(len(q), 1, -1, -1)
    return SlicedAttention.apply(q, k, v, mask, dropout, scale)


CORES: dict[str, Core] = {"sdpa": sdpa, "sliced": sliced}
