"""Attention of one step of generation, in its two forms. Inference alone: neither has a gradient.

`decode_attention`: the few query rows of a segment (the beams of an image) over the segment's keys.

    out[r] = softmax(scale · q[r] kᵀ[segment r // n]) v[segment r // n],      n = query rows / segments

`cached_attention`: one new token per row over a cache whose entries lie anywhere, named by a table of slots.

    out[r] = softmax(scale · q[r] k[slots[r]]ᵀ) v[slots[r]]

Both are bound by reading keys and values: 2 · keys · head_dim elements a head for 4 FLOPs an element and query row.
So the kernel of the first lets all beams of a segment share one tile, and each key is read once a step for all of
them. That leaves segments × heads programs, too few for a GPU (8 images × 12 heads on 132 multiprocessors); the keys
are split over programs, whose partial sums a second kernel merges:

    m = max mᵢ,  out = Σ exp(mᵢ − m) · accᵢ / Σ exp(mᵢ − m) · sumᵢ       (split i: maximum, unnormalised output, sum)

The second form reads through the table, so reordering beams moves indices, not caches, and beams with a common history
meet its entries in the cache of the GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.attention import check_shapes
from blip_kernels.backends import op_backend

HEAD_DIMS = (32, 64, 128)  # of the kernels; the twins take any
MOST_ROWS = 16  # query rows of a segment: the height of a tensor-core tile


# --------------------------------------------------------------------------------------------------- the eager twins


def _decode_reference(q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor, scale: float) -> Tensor:
    """Segments as a batch, padded where their lengths differ."""
    segments, lengths = len(kv_offsets) - 1, kv_offsets.diff()
    longest = int(lengths.max())
    if longest == 0 or q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    queries = q.reshape(segments, -1, *q.shape[1:]).transpose(1, 2)
    if longest * segments == len(k):
        keys, values = (x.unflatten(0, (segments, longest)).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return out.transpose(1, 2).reshape(q.shape)
    mask = torch.arange(longest, device=q.device) < lengths[:, None]
    place = (kv_offsets[:-1, None] + torch.arange(longest, device=q.device)).clamp(max=len(k) - 1)
    keys, values = (x[place].transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, mask[:, None, None], scale=scale)
    out = out.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return out.transpose(1, 2).reshape(q.shape)


def _cached_reference(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float) -> Tensor:
    """The entries gathered, then two small products a row."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2) for x in (k, v))
    logits = (q[:, :, None] @ keys.transpose(-1, -2)).to(wide) * scale
    return (torch.softmax(logits, -1).to(q.dtype) @ values).squeeze(2)


# ------------------------------------------------------------------------------------------------------ registration


@torch.library.custom_op("blip_kernels::decode_attention", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor, scale: float, backend: str) -> Tensor:
    if backend == "reference":
        return _decode_reference(q, k, v, kv_offsets, scale).contiguous()
    from blip_kernels.gpu.decode_attention import decode

    return decode(q, k, v, kv_offsets, scale)


@torch.library.custom_op("blip_kernels::cached_attention", mutates_args=())
def _cached(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float, backend: str) -> Tensor:
    if backend == "reference":
        return _cached_reference(q, k, v, slots, scale).contiguous()
    from blip_kernels.gpu.decode_attention import cached

    return cached(q, k, v, slots, scale)


@_decode.register_fake
@_cached.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, where: Tensor, scale: float, backend: str) -> Tensor:
    return q.new_empty(q.shape)


# ---------------------------------------------------------------------------------------------- the public functions


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which every segment of keys is read by the same number of consecutive query rows, 1 to 16.

    Args:
        q: [query rows, heads, head_dim], float32, bfloat16 or float16; row r reads segment r // (rows / segments).
        k: [key rows, heads, head_dim], same dtype and device. A view such as `kv[:, layer, 0]` is read in place: any
            strides, but head_dim contiguous (else it is copied).
        v: as `k`, with strides of its own.
        kv_offsets: int32 [segments + 1], from 0 to the number of key rows, never falling.
        scale: factor of the logits; 1/√head_dim unless given.
        backend: `auto` (default), `triton` or `reference`, see `blip_kernels.backends.op_backend`. Kernels take
            head_dim 32, 64 and 128; `auto` leaves others to the twin.

    Returns:
        [query rows, heads, head_dim] in `q`'s dtype, contiguous. Queries of an empty segment get zeros.

    Raises:
        ValueError: shapes, dtypes, devices or offsets do not fit (the message names the argument), or an argument
            requires grad while gradients are recorded: use `attention`, or `torch.no_grad()`.
    """
    _check(q, k, v)
    segments = len(kv_offsets) - 1
    if kv_offsets.dtype != torch.int32 or kv_offsets.ndim != 1 or segments < 1:
        raise ValueError(f"kv_offsets must be int32 [segments + 1], got {kv_offsets.dtype} {tuple(kv_offsets.shape)}")
    if len(q) % segments or len(q) // segments > MOST_ROWS:
        raise ValueError(f"q must have the same number of rows, at most {MOST_ROWS}, for each of the {segments} "
                         f"segments of kv_offsets, got {len(q)} rows: `attention` takes any number")
    _check_place(kv_offsets, "kv_offsets", q)
    # Values on a GPU would have to be waited for; there the shapes alone are checked.
    if kv_offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last, falls = int(kv_offsets[0]), int(kv_offsets[-1]), bool((kv_offsets.diff() < 0).any())
        if first != 0 or last != len(k) or falls:
            raise ValueError(f"kv_offsets must rise from 0 to {len(k)}, the number of key rows; got {first} to {last}")
    return _decode(q, k, v, kv_offsets, *_how(q, scale, backend))


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one query per row over cache entries that a table names.

    Args:
        q: [rows, heads, head_dim], float32, bfloat16 or float16.
        k: [entries, heads, head_dim], the cache, same dtype and device; strides as in `decode_attention`.
        v: as `k`.
        slots: int64 [rows, length ≥ 1]: where each row's tokens lie in the cache, 0 to entries − 1, in any order and
            shared at will; a view of a longer table is read in place. Values outside are an error on a CPU and
            undefined on a GPU.
        scale, backend: as in `decode_attention`.

    Returns:
        [rows, heads, head_dim] in `q`'s dtype, contiguous.

    Raises:
        ValueError: as `decode_attention`.
    """
    _check(q, k, v)
    if slots.dtype != torch.int64 or slots.ndim != 2 or len(slots) != len(q) or slots.shape[1] == 0:
        raise ValueError(f"slots must be int64 [{len(q)}, length] as q's rows, of a length of 1 at least, got "
                         f"{slots.dtype} {tuple(slots.shape)}")
    _check_place(slots, "slots", q)
    if slots.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in slots.aminmax())
        if low < 0 or high >= len(k):
            raise ValueError(f"slots must lie in 0 to {len(k) - 1}, the rows of k, got {low} to {high}")
    return _cached(q, k, v, slots, *_how(q, scale, backend))


def _how(q: Tensor, scale: float | None, backend: str | None) -> tuple[float, str]:
    """Factor of the logits, and the implementation."""
    chosen, head_dim = op_backend(q, backend), q.shape[-1]
    if chosen == "triton" and (head_dim not in HEAD_DIMS or q.dtype == torch.float64):
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot run: q is {q.dtype} with head_dim {head_dim}, its kernels take "
                             f"16 and 32 bits and {', '.join(map(str, HEAD_DIMS))}; choose auto or reference")
        chosen = "reference"
    return (head_dim**-0.5 if scale is None else float(scale)), chosen


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shapes(q, k, v)
    _check_place(k, "k", q)
    _check_place(v, "v", q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q, k or v requires grad, but a step of generation has no gradient: call it under "
                         "torch.no_grad(), or take `attention`")


def _check_place(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}: move it there")
