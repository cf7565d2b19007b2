"""Attention over packed segments.

    out[i] = softmax(scale · q[i] kᵀ[segment of i]) v[segment of i]

Rows of all segments stand one after another; `q_offsets` and `kv_offsets` say where each segment starts. Query segment
s reads key segment s and nothing else, so texts of different lengths need no padding, and one key segment (an image)
serves all the query rows that belong to it (its captions, its beams).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.backends import attention_backend
from blip_kernels.sliced_attention import SlicedAttention

# (q, k, v [segments, heads, tokens, head_dim], mask or None, causal, dropout, scale) → as q
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, float], Tensor]


def _attention_reference(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
                         dropout: float, scale: float) -> Tensor:
    """The formula, one segment at a time, in float32 at least. Slow and obvious."""
    out = torch.zeros_like(q)
    q_bounds, kv_bounds = q_offsets.tolist(), kv_offsets.tolist()
    wide = torch.promote_types(q.dtype, torch.float32)
    pieces = []
    for s in range(len(q_bounds) - 1):
        q_rows, kv_rows = slice(q_bounds[s], q_bounds[s + 1]), slice(kv_bounds[s], kv_bounds[s + 1])
        q_s, k_s, v_s = q[q_rows].to(wide), k[kv_rows].to(wide), v[kv_rows].to(wide)
        if k_s.shape[0] == 0:
            pieces.append(out[q_rows])
            continue
        logits = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        if causal:
            logits = logits.masked_fill(~_causal_mask(q_s.shape[0], k_s.shape[0], q.device), float("-inf"))
        weights = F.dropout(torch.softmax(logits, dim=-1), dropout)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v_s).to(q.dtype))
    return torch.cat(pieces) if pieces else out


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys], True where a query may look: the last query sees every key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _attention_padded(core: Core, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor,
                      causal: bool, dropout: float, scale: float) -> Tensor:
    """Segments padded into a batch for `core`; equal lengths are a view and cost nothing."""
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

    # With equal query and key segments the causal mask alone keeps real rows from padded keys, which stand behind them.
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
    """[segments, 1, longest_q, longest_kv], bottom-right aligned in each segment."""
    queries = torch.arange(longest_q, device=q_lengths.device)[None, :, None]
    keys = torch.arange(longest_kv, device=q_lengths.device)[None, None, :]
    ends = queries + (kv_lengths - q_lengths)[:, None, None]
    return ((keys <= ends) & (keys < kv_lengths[:, None, None]))[:, None]


def _places(offsets: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """int64 [rows]: where each packed row stands in the padded batch [segments × longest]."""
    shift = torch.arange(len(lengths), device=offsets.device) * longest - offsets[:-1]
    return torch.arange(int(offsets[-1]), device=offsets.device) + torch.repeat_interleave(shift, lengths.long())


def _pad(x: Tensor, segments: int, longest: int, places: Tensor | None) -> Tensor:
    """[rows, heads, head_dim] → [segments, heads, longest, head_dim], zeros behind the shorter segments."""
    rows = x if places is None else _Pad.apply(x, places, segments * longest)
    return rows.reshape(segments, longest, *x.shape[1:]).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """Rows to their places in a padded batch. Places are unique, so the gradient is a plain gather."""

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
        return grad.new_zeros(ctx.padded_rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scale)


def _sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float) -> Tensor:
    if causal:
        mask = _causal_mask(q.shape[2], k.shape[2], q.device).expand(len(q), 1, -1, -1)
    return SlicedAttention.apply(q, k, v, mask, dropout, scale)


_IMPLEMENTATIONS = {
    "reference": _attention_reference,
    "sdpa": partial(_attention_padded, _sdpa),
    "sliced": partial(_attention_padded, _sliced),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which query segment s reads key segment s.

    Args:
        q: [query rows, heads, head_dim], float32, bfloat16 or float16.
        k: [key rows, heads, head_dim], same dtype and device as `q`.
        v: as `k`.
        q_offsets: int32 [segments + 1], from 0 to the number of query rows, never falling.
        kv_offsets: int32 [segments + 1], from 0 to the number of key rows, never falling.
        causal: within a segment, the last query sees every key, the one before it all but the last, and so on.
        dropout: probability with which an attention weight is dropped (0 outside training).
        scale: factor of the logits; 1/√head_dim unless given.
        backend: one of `blip_kernels.backends.ATTENTION_BACKENDS`; None reads `BLIP_FAST_ATTENTION`.

    Returns:
        [query rows, heads, head_dim] in `q`'s dtype. Queries of an empty key segment get zeros.

    Raises:
        ValueError: shapes, dtypes, devices or offsets do not fit; the message names the argument.
    """
    _check(q, k, v, q_offsets, kv_offsets, dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _IMPLEMENTATIONS[attention_backend(q, backend)](q, k, v, q_offsets, kv_offsets, causal, dropout, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, dropout: float) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [rows, heads, head_dim], got shape {tuple(q.shape)}")
    if k.shape != v.shape or k.ndim != 3 or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"k and v must be [rows, {q.shape[1]}, {q.shape[2]}] as q is, got {tuple(k.shape)} and "
                         f"{tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if q_offsets.shape != kv_offsets.shape:
        raise ValueError(f"q_offsets and kv_offsets must be of one length (segments + 1), got {len(q_offsets)} and "
                         f"{len(kv_offsets)}")
    for name, offsets, rows in (("q_offsets", q_offsets, len(q)), ("kv_offsets", kv_offsets, len(k))):
        if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError(f"{name} must be int32 [segments + 1], got {offsets.dtype} {tuple(offsets.shape)}")
        if offsets.device != q.device:
            raise ValueError(f"{name} is on {offsets.device}, q on {q.device}: move it there")
        # Reading values on an accelerator would stall it; there the shapes alone are checked.
        if offsets.device.type != "cpu":
            continue
        first, last, falls = int(offsets[0]), int(offsets[-1]), bool((offsets.diff() < 0).any())
        if first != 0 or last != rows or falls:
            raise ValueError(f"{name} must rise from 0 to {rows}, the number of rows; got {first} to {last}")
