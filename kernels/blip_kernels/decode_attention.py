"""Attention of one step of generation, in two forms. For inference only: neither has a gradient.

`decode_attention`: the few query rows of a segment (the beams of an image) over the segment's keys.

    out[r] = softmax(scale · q[r] k[s, :lengths[s]]ᵀ) v[s, :lengths[s]],   s = r // n,  n = query rows / segments

`cached_attention`: one new token per row over a cache whose entries may lie anywhere; a table of slots names
them.

    out[r] = softmax(scale · q[r] k[slots[r, :lengths[r]]]ᵀ) v[slots[r, :lengths[r]]]

All segments or rows have room for the same number of keys, and each uses as many as it needs: shapes do not
change from step to step as texts grow, come and go.

Both are bound by reading keys and values: 2 · keys · head_dim elements per head, for 4 FLOPs per element and
query row. In the first form all beams of a segment therefore share one tile, and each key is read once per
step for all of them. That leaves segments × heads programs, too few for a GPU (8 images × 12 heads on 132
multiprocessors). So the keys are split over programs, and a second kernel merges their partial sums:

    m = max mᵢ,  out = Σ exp(mᵢ − m) · accᵢ / Σ exp(mᵢ − m) · sumᵢ     (split i: maximum, raw output, sum)

The second form reads through the table, so reordering beams moves indices, not caches, and beams with a
common history find its entries in the GPU's cache.

On a CPU the first form is two batched products over heads. They read keys in place if a head's keys are
contiguous ([segments, heads, keys, head_dim] in memory); otherwise PyTorch copies them first, which takes
many times as long. The second form gathers its entries, which is fastest if an entry's heads are contiguous.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.backends import op_backend
from blip_kernels.cpu.products import matmul

HEAD_DIMS = (32, 64, 128)  # that the kernels take; the twins take any
MOST_ROWS = 64  # query rows of a segment: one tile holds them


# -------------------------------------------------------------------------------------------- the eager twins


def _decode_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention with segments as a batch."""
    if k.numel() == 0 or q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    queries = q.reshape(len(k), -1, *q.shape[1:]).transpose(1, 2)  # [segments, heads, rows, head_dim]
    return _masked(queries, k.transpose(1, 2), v.transpose(1, 2), lengths,
                   scale).transpose(1, 2).reshape(q.shape)


def _cached_reference(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor,
                      scale: float) -> Tensor:
    """Gather the entries, then use PyTorch's attention with rows as a batch."""
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    keys, values = (x.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
                    for x in (k, v))
    seen = (torch.arange(slots.shape[1], device=q.device) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, seen, scale=scale).squeeze(2)


def _masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """q [batch, heads, rows, head_dim] reads the first `lengths` [batch] of k, v [batch, heads, keys, head_dim]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = matmul(q, k.transpose(-1, -2)).to(wide) * scale
    shortest = int(lengths.min())
    if shortest < k.shape[2]:
        keys = torch.arange(k.shape[2], device=q.device)
        logits.masked_fill_((keys >= lengths[:, None])[:, None, None], -torch.inf)
    out = matmul(torch.softmax(logits, -1).to(q.dtype), v)
    return out if shortest else out.masked_fill_((lengths == 0)[:, None, None, None], 0.0)


# ----------------------------------------------------------------------------------------------- registration


@torch.library.custom_op("blip_kernels::decode_attention", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, backend: str) -> Tensor:
    if backend == "reference":
        return _decode_reference(q, k, v, lengths, scale).contiguous()
    from blip_kernels.gpu.decode_kernels import decode

    return decode(q, k, v, lengths, scale)


@torch.library.custom_op("blip_kernels::cached_attention", mutates_args=())
def _cached(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, scale: float,
            backend: str) -> Tensor:
    if backend == "reference":
        return _cached_reference(q, k, v, slots, lengths, scale).contiguous()
    from blip_kernels.gpu.decode_kernels import cached

    return cached(q, k, v, slots, lengths, scale)


@_decode.register_fake
@_cached.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


# --------------------------------------------------------------------------------------- the public functions


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which every segment of keys is read by the same number of consecutive query rows, 1 to 64.

    Args:
        q: [query rows, heads, head_dim], float32, bfloat16 or float16; row r reads segment r // (rows /
            segments).
        k: [segments, keys, heads, head_dim], same dtype and device. A view is read in place if head_dim is
            contiguous, with any other strides; otherwise it is copied. Keys past a segment's length must be
            finite.
        v: as `k`, with strides of its own.
        lengths: int32 [segments]: how many of its keys each segment uses, 0 to all.
        scale: factor of the logits; 1/√head_dim unless given.
        backend: `auto` (default), `triton` or `reference`, see `blip_kernels.backends.op_backend`. Kernels
            take head_dim 32, 64 and 128; `auto` takes the twin for others.

    Returns:
        [query rows, heads, head_dim] in `q`'s dtype, contiguous. Queries of an empty segment get zeros.

    Raises:
        ValueError: shapes, dtypes, devices or lengths do not fit (the message names the argument), or an
            argument requires grad while gradients are recorded: use `attention`, or `torch.no_grad()`.
    """
    _check(q, k, v, "[segments, keys, heads, head_dim]")
    segments, keys = k.shape[:2]
    if segments < 1 or len(q) % segments or len(q) // segments > MOST_ROWS:
        raise ValueError(f"q must have the same number of rows, at most {MOST_ROWS}, for each of the {segments} "
                         f"segments of k, got {len(q)} rows: `attention` takes any number")
    _check_lengths(lengths, segments, 0, keys, q)
    return _decode(q, k, v, lengths, *_how(q, scale, backend))


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one query per row over cache entries that a table names.

    Args:
        q: [rows, heads, head_dim], float32, bfloat16 or float16.
        k: [entries, heads, head_dim], the cache, same dtype and device; strides as in `decode_attention`. All
            entries must be finite.
        v: as `k`.
        slots: int64 [rows, length ≥ 1]: where each row's tokens lie in the cache, 0 to entries − 1. Any
            order; rows may share entries. A view of a longer table is read in place. Values out of range are
            an error on a CPU and undefined behaviour on a GPU.
        lengths: int32 [rows]: how many of its slots each row uses, 1 to all.
        scale, backend: as in `decode_attention`.

    Returns:
        [rows, heads, head_dim] in `q`'s dtype, contiguous.

    Raises:
        ValueError: as `decode_attention`.
    """
    _check(q, k, v, "[entries, heads, head_dim]")
    if slots.dtype != torch.int64 or slots.ndim != 2 or len(slots) != len(q) or slots.shape[1] == 0:
        raise ValueError(f"slots must be int64 [{len(q)}, length] as q's rows, of a length of 1 at least, got "
                         f"{slots.dtype} {tuple(slots.shape)}")
    _check_place(slots, "slots", q)
    if _readable(slots):
        low, high = (int(x) for x in slots.aminmax())
        if low < 0 or high >= len(k):
            raise ValueError(f"slots must lie in 0 to {len(k) - 1}, the rows of k, got {low} to {high}")
    _check_lengths(lengths, len(q), 1, slots.shape[1], q)
    return _cached(q, k, v, slots, lengths, *_how(q, scale, backend))


def _how(q: Tensor, scale: float | None, backend: str | None) -> tuple[float, str]:
    """Return the factor of the logits, and the implementation."""
    chosen, head_dim = op_backend(q, backend), q.shape[-1]
    if chosen == "triton" and (head_dim not in HEAD_DIMS or q.dtype == torch.float64):
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot run: q is {q.dtype} with head_dim {head_dim}, its kernels take "
                             f"16 and 32 bits and {', '.join(map(str, HEAD_DIMS))}; choose auto or reference")
        chosen = "reference"
    return (head_dim**-0.5 if scale is None else float(scale)), chosen


def _check(q: Tensor, k: Tensor, v: Tensor, wanted: str) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [rows, heads, head_dim], got shape {tuple(q.shape)}")
    if k.shape != v.shape or k.ndim != wanted.count(",") + 1 or k.shape[-2:] != q.shape[1:]:
        raise ValueError(f"k and v must be {wanted} with q's heads {tuple(q.shape[1:])}, got {tuple(k.shape)} and "
                         f"{tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    _check_place(k, "k", q)
    _check_place(v, "v", q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k or v requires grad, but a step of generation has no gradient: call it under "
                         "torch.no_grad(), or take `attention`")


def _check_lengths(lengths: Tensor, count: int, least: int, most: int, q: Tensor) -> None:
    if lengths.dtype != torch.int32 or lengths.shape != (count,):
        raise ValueError(f"lengths must be int32 [{count}], got {lengths.dtype} {tuple(lengths.shape)}")
    _check_place(lengths, "lengths", q)
    if _readable(lengths):
        low, high = (int(x) for x in lengths.aminmax())
        if low < least or high > most:
            raise ValueError(f"lengths must lie in {least} to {most}, got {low} to {high}")


def _readable(x: Tensor) -> bool:
    """Whether values can be checked: reading them on a GPU would stall it, and a compiler has none."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _check_place(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}: move it there")
