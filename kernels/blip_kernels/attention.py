"""Attention over packed segments.

    out[i] = dropout(softmax(scale · q[i] kᵀ[segment of i])) v[segment of i]

Rows of all segments are stored one after another; `q_offsets` and `kv_offsets` say where each segment starts.
Query segment s reads only key segment s. So texts of different lengths need no padding, and one key segment
(an image) serves all query rows that belong to it (its captions, its beams).

The op saves the log-sum-exp of each row's logits and recomputes the weights in its backward:

    p = exp(s − lse),  δ = Σ dout · out,  dp = dropout(dout vᵀ),  ds = p · (dp − δ)
    dq = scale · ds k,  dk = scale · dsᵀ q,  dv = dropout(p)ᵀ dout

Dropout is a function of (seed, head, query row, key): the backward and the eager twin drop the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_kernels.backends import attention_backend
from blip_kernels.constants import DROPOUT_STEPS
from blip_kernels.cpu import block_attention
from blip_kernels.cpu.padded_attention import CORES, causal_mask, padded_attention
from blip_kernels.random import new_seed, philox

MAX_ROWS = 2**31 - 1  # offsets are int32


# ---------------------------------------------------------------- the eager twin


@dataclass(frozen=True)
class _Segment:
    """One segment, in float32 or wider: its rows, its weights, and its dropout factors."""

    q_rows: slice
    kv_rows: slice
    weights: Tensor  # [heads, queries, keys]
    kept: Tensor | None  # the same shape: 0 where dropped, 1 / (1 − dropout) elsewhere
    lse: Tensor  # [heads, queries], +∞ where a query sees no key


def _segments(q: Tensor, k: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool, dropout: float,
              scale: float, seed: int) -> Iterator[_Segment]:
    """The formula, one segment at a time."""
    q_bounds, kv_bounds = q_offsets.tolist(), kv_offsets.tolist()
    wide = torch.promote_types(q.dtype, torch.float32)
    for s in range(len(q_bounds) - 1):
        q_rows, kv_rows = slice(q_bounds[s], q_bounds[s + 1]), slice(kv_bounds[s], kv_bounds[s + 1])
        queries, keys = q_rows.stop - q_rows.start, kv_rows.stop - kv_rows.start
        logits = torch.einsum("qhd,khd->hqk", q[q_rows].to(wide), k[kv_rows].to(wide)) * scale
        if causal:
            logits = logits.masked_fill(~causal_mask(queries, keys, q.device), float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        lse = torch.where(lse == float("-inf"), float("inf"), lse)  # no key: weights of zero
        kept = _dropout_factors(q.shape[1], q_rows, keys, dropout, seed, q.device) if dropout else None
        yield _Segment(q_rows, kv_rows, torch.exp(logits - lse[..., None]), kept, lse)


def _dropout_factors(heads: int, q_rows: slice, keys: int, dropout: float, seed: int, device: torch.device) -> Tensor:
    """Dropout's factors [heads, queries, keys]: 16 bits per weight, eight weights per call of Philox."""
    head = torch.arange(heads, device=device)[:, None, None]
    row = torch.arange(q_rows.start, q_rows.stop, device=device)[None, :, None]
    group = torch.arange(-(-keys // 8), device=device)[None, None, :]
    words = torch.stack(philox(seed, group, row, head), dim=-1)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(2)[..., :keys]
    threshold = round(dropout * DROPOUT_STEPS)
    return (bits >= threshold).float() * (DROPOUT_STEPS / (DROPOUT_STEPS - threshold))


def _twin_forward(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
                  dropout: float, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    for s in _segments(q, k, q_offsets, kv_offsets, causal, dropout, scale, seed):
        weights = s.weights if s.kept is None else s.weights * s.kept
        out[s.q_rows] = torch.einsum("hqk,khd->qhd", weights, v[s.kv_rows].to(wide)).to(q.dtype)
        lse[:, s.q_rows] = s.lse
    return out, lse


def _twin_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_offsets: Tensor,
                   kv_offsets: Tensor, causal: bool, dropout: float, scale: float,
                   seed: int) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    for s in _segments(q, k, q_offsets, kv_offsets, causal, dropout, scale, seed):
        grad_s, out_s = grad[s.q_rows].to(wide), out[s.q_rows].to(wide)
        delta = (grad_s * out_s).sum(-1).T[..., None]  # [heads, queries, 1]
        d_weights = torch.einsum("qhd,khd->hqk", grad_s, v[s.kv_rows].to(wide))
        weights = s.weights
        if s.kept is not None:
            weights, d_weights = weights * s.kept, d_weights * s.kept
        d_logits = s.weights * (d_weights - delta) * scale
        dv[s.kv_rows] = torch.einsum("hqk,qhd->khd", weights, grad_s).to(v.dtype)
        dq[s.q_rows] = torch.einsum("hqk,khd->qhd", d_logits, k[s.kv_rows].to(wide)).to(q.dtype)
        dk[s.kv_rows] = torch.einsum("hqk,qhd->khd", d_logits, q[s.q_rows].to(wide)).to(k.dtype)
    return dq, dk, dv


# ---------------------------------------------------------------- registration


@torch.library.custom_op("blip_kernels::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool, dropout: float,
        scale: float, seed: int, triton: bool) -> tuple[Tensor, Tensor]:
    """Return out and the log-sum-exp [heads, query rows], base 2 with Triton."""
    if triton:
        from blip_kernels.gpu.attention_kernels import forward

        return forward(q, k, v, q_offsets, kv_offsets, causal, dropout, scale, seed)
    return _twin_forward(q, k, v, q_offsets, kv_offsets, causal, dropout, scale, seed)


@_op.register_fake
def _(q, k, v, q_offsets, kv_offsets, causal, dropout, scale, seed, triton):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("blip_kernels::attention_backward", mutates_args=())
def _backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor,
                 kv_offsets: Tensor, causal: bool, dropout: float, scale: float, seed: int,
                 triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from blip_kernels.gpu.attention_kernels import backward

        return backward(grad, q, k, v, out, lse, q_offsets, kv_offsets, causal, dropout, scale, seed)
    return _twin_backward(grad, q, k, v, out, q_offsets, kv_offsets, causal, dropout, scale, seed)


@_backward_op.register_fake
def _(grad, q, k, v, out, lse, q_offsets, kv_offsets, causal, dropout, scale, seed, triton):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, q_offsets, kv_offsets, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, q_offsets, kv_offsets)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7


_op.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- the public function


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
        causal: in a segment the last query sees every key, the one before it all but the last, and so on.
        dropout: probability with which an attention weight is dropped (0 outside training).
        scale: factor of the logits; 1/√head_dim unless given.
        backend: one of `blip_kernels.backends.ATTENTION_BACKENDS`; None reads `BLIP_FAST_ATTENTION`.

    Returns:
        [query rows, heads, head_dim] in `q`'s dtype. Queries that see no key get zeros. A NaN makes the rows
        that see it NaN or infinite, and no others.

    Raises:
        ValueError: shapes, dtypes, devices or offsets do not fit, or the backend cannot run; the message says
            which.
    """
    _check(q, k, v, q_offsets, kv_offsets, dropout)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = attention_backend(q, backend)
    if chosen in block_attention.ADAPTERS:
        return block_attention.ADAPTERS[chosen](q, k, v, q_offsets, kv_offsets, causal, dropout, factor)
    if chosen in CORES:
        return padded_attention(CORES[chosen], q, k, v, q_offsets, kv_offsets, causal, dropout, factor)
    return _op(q, k, v, q_offsets, kv_offsets, causal, dropout, factor, new_seed() if dropout else 0,
               chosen == "triton")[0]


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are [rows, heads, head_dim] of one floating dtype, k and v alike."""
    if q.ndim != 3:
        raise ValueError(f"q must be [rows, heads, head_dim], got shape {tuple(q.shape)}")
    if k.shape != v.shape or k.ndim != 3 or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"k and v must be [rows, {q.shape[1]}, {q.shape[2]}] as q is, got {tuple(k.shape)} and "
                         f"{tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def _check(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, dropout: float) -> None:
    check_shapes(q, k, v)
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if q_offsets.shape != kv_offsets.shape:
        raise ValueError(f"q_offsets and kv_offsets must be of one length (segments + 1), got {len(q_offsets)} and "
                         f"{len(kv_offsets)}")
    for name, offsets, rows in (("q_offsets", q_offsets, len(q)), ("kv_offsets", kv_offsets, len(k))):
        if rows > MAX_ROWS:
            raise ValueError(f"{name} would have to reach {rows} rows, beyond int32: split the batch")
        if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError(f"{name} must be int32 [segments + 1], got {offsets.dtype} {tuple(offsets.shape)}")
        if offsets.device != q.device:
            raise ValueError(f"{name} is on {offsets.device}, q on {q.device}: move it there")
        # Reading values would stall an accelerator and is impossible while compiling: only shapes are checked
        # there.
        if offsets.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        first, last, falls = int(offsets[0]), int(offsets[-1]), bool((offsets.diff() < 0).any())
        if first != 0 or last != rows or falls:
            raise ValueError(f"{name} must rise from 0 to {rows}, the number of rows; got {first} to {last}")
