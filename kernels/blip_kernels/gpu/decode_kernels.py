"""Triton kernels of one step of generation. What they compute: `blip_kernels.decode_attention`.

`_decode_kernel`: a program takes one head of one segment, all its query rows (padded to the 16 of a
tensor-core tile, or to the next power of two) and one split of its keys, in whole tiles of `BLOCK_N`. The
host knows only the room for keys, so the number of splits is what gives `PROGRAMS` programs, at most one
split per tile of a full segment. A program of a short segment may find nothing to do. With one split it
writes the output, otherwise maximum, sum and unnormalised output in float32, which `_merge_kernel` combines.
Traffic is k and v once, plus 2 · splits · rows · heads · (head_dim + 2) · 4 bytes: 4 % of 16-bit k and v for
three beams, 577 keys and four splits. Tiles that lie completely in a segment run without masks.

`_cached_kernel`: a program takes one head of one row. A table of a few dozen slots needs no split, and a
single query row needs no tensor core: products are float32 multiplications and sums over loaded tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.gpu.configs import config
from blip_kernels.gpu.kernel_launch import generation, launch, strides
from blip_kernels.gpu.streaming import LOG2E, precision


@triton.jit
def _decode_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, first, end, n_kv, scale, MASKED: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Online softmax over keys first to end of a segment of n_kv keys."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    for start in range(first, end, BLOCK_N):
        p_b_k = p_k + tl.cast(start, tl.int64) * s_k + (o_n[None, :] * s_k + o_d[:, None])
        p_b_v = p_v + tl.cast(start, tl.int64) * s_v + (o_n[:, None] * s_v + o_d[None, :])
        if MASKED:
            m_n = start + o_n < n_kv
            b_k = tl.load(p_b_k, mask=m_n[None, :], other=0.0)
            b_v = tl.load(p_b_v, mask=m_n[:, None], other=0.0)
        else:
            b_k = tl.load(p_b_k)
            b_v = tl.load(p_b_v)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        correction = tl.exp2(b_max - new_max)
        b_p = tl.exp2(b_s - new_max[:, None])
        b_sum = b_sum * correction + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * correction[:, None], input_precision=PRECISION)
        b_max = new_max
    return acc, b_max, b_sum


@triton.jit(do_not_specialize=["group", "rows"])
def _decode_kernel(p_q, p_k, p_v, p_lengths, p_out, p_parts, group, rows, s_q, s_qh, s_ks, s_k, s_kh, s_vs,
                   s_v, s_vh, scale, SPLITS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_N: tl.constexpr, D: tl.constexpr):
    i_segment, i_head, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    n_kv = tl.load(p_lengths + i_segment)
    tiles = (n_kv + BLOCK_N - 1) // BLOCK_N
    first = tiles * i_split // SPLITS * BLOCK_N
    end = tl.minimum(tiles * (i_split + 1) // SPLITS * BLOCK_N, n_kv)
    whole = tl.maximum(tl.minimum(end, n_kv // BLOCK_N * BLOCK_N), first)
    o_q, o_d = tl.arange(0, BLOCK_Q), tl.arange(0, D)
    m_q = o_q < group
    o_row = i_segment.to(tl.int64) * group + o_q
    b_q = tl.load(p_q + o_row[:, None] * s_q + i_head.to(tl.int64) * s_qh + o_d[None, :], mask=m_q[:, None],
                  other=0.0)
    p_k += i_segment.to(tl.int64) * s_ks + i_head.to(tl.int64) * s_kh
    p_v += i_segment.to(tl.int64) * s_vs + i_head.to(tl.int64) * s_vh
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc, b_max, b_sum = _decode_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, first, whole, n_kv, scale,
                                      False, PRECISION, BLOCK_N, D)
    acc, b_max, b_sum = _decode_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, whole, end, n_kv, scale,
                                      True, PRECISION, BLOCK_N, D)
    o_item = o_row * heads + i_head
    if SPLITS == 1:
        acc = acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]  # rows of an empty segment: zeros
        tl.store(p_out + o_item[:, None] * D + o_d[None, :], acc.to(p_out.dtype.element_ty),
                 mask=m_q[:, None])
    else:
        o_item += i_split.to(tl.int64) * rows * heads
        tl.store(p_parts + o_item[:, None] * (D + 2) + o_d[None, :], acc, mask=m_q[:, None])
        tl.store(p_parts + o_item * (D + 2) + D, b_max, mask=m_q)
        tl.store(p_parts + o_item * (D + 2) + D + 1, b_sum, mask=m_q)


@triton.jit(do_not_specialize=["items"])
def _merge_kernel(p_parts, p_out, items, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr):
    """One row of one head: parts [SPLITS, items, D + 2] (output, maximum, sum) → out [items, D]."""
    i_item = tl.program_id(0).to(tl.int64)
    o_split, o_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    m_split = o_split < SPLITS
    p_part = p_parts + (o_split.to(tl.int64) * items + i_item) * (D + 2)
    b_max = tl.load(p_part + D, mask=m_split, other=float("-inf"))
    b_sum = tl.load(p_part + D + 1, mask=m_split, other=0.0)
    b_part = tl.load(p_part[:, None] + o_d[None, :], mask=m_split[:, None], other=0.0)
    largest = tl.max(b_max, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # no split saw a key
    b_weight = tl.exp2(b_max - largest)
    total = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_out + i_item * D + o_d, b_out.to(p_out.dtype.element_ty))


@triton.jit
def _cached_tile(acc, b_max, b_sum, b_q, p_k, p_v, p_slots, s_k, s_v, start, length, scale,
                 MASKED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Online softmax over the entries that BLOCK_N slots from `start` name."""
    o_n, o_d = start + tl.arange(0, BLOCK_N), tl.arange(0, D)
    if MASKED:
        m_n = o_n < length
        b_slot = tl.load(p_slots + o_n, mask=m_n, other=0)
        b_k = tl.load(p_k + b_slot[:, None] * s_k + o_d[None, :], mask=m_n[:, None], other=0.0)
        b_v = tl.load(p_v + b_slot[:, None] * s_v + o_d[None, :], mask=m_n[:, None], other=0.0)
    else:
        b_slot = tl.load(p_slots + o_n)
        b_k = tl.load(p_k + b_slot[:, None] * s_k + o_d[None, :])
        b_v = tl.load(p_v + b_slot[:, None] * s_v + o_d[None, :])
    b_s = tl.sum(b_q[None, :] * b_k.to(tl.float32), 1) * scale
    if MASKED:
        b_s = tl.where(m_n, b_s, float("-inf"))
    new_max = tl.maximum(b_max, tl.max(b_s, 0))
    correction = tl.exp2(b_max - new_max)
    b_p = tl.exp2(b_s - new_max)
    b_sum = b_sum * correction + tl.sum(b_p, 0)
    acc = acc * correction + tl.sum(b_p[:, None] * b_v.to(tl.float32), 0)
    return acc, new_max, b_sum


@triton.jit
def _cached_kernel(p_q, p_k, p_v, p_slots, p_lengths, p_out, s_q, s_qh, s_k, s_kh, s_v, s_vh, s_slots, scale,
                   BLOCK_N: tl.constexpr, D: tl.constexpr):
    i_row, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    b_q = tl.load(p_q + i_row * s_q + i_head * s_qh + o_d).to(tl.float32)
    p_k += i_head * s_kh
    p_v += i_head * s_vh
    p_slots += i_row * s_slots
    length = tl.load(p_lengths + i_row)
    acc = tl.zeros([D], tl.float32)
    b_max, b_sum = float("-inf"), 0.0
    whole = length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc, b_max, b_sum = _cached_tile(acc, b_max, b_sum, b_q, p_k, p_v, p_slots, s_k, s_v, start, length,
                                         scale, False, BLOCK_N, D)
    if whole < length:
        acc, b_max, b_sum = _cached_tile(acc, b_max, b_sum, b_q, p_k, p_v, p_slots, s_k, s_v, whole, length,
                                         scale, True, BLOCK_N, D)
    o_out = (i_row * tl.num_programs(1) + i_head) * D + o_d
    tl.store(p_out + o_out, (acc / b_sum).to(p_out.dtype.element_ty))


# -------------------------------------------------------------------------------------------------- launchers


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Arguments and result as `blip_kernels.decode_attention`; heads are 32, 64 or 128 wide."""
    q, k, v, lengths = _in_heads(q), _in_heads(k), _in_heads(v), lengths.contiguous()
    (rows, heads, head_dim), (segments, keys) = q.shape, k.shape[:2]
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    chosen, merging = _config("decode", q), _config("merge", q)
    splits = _splits(segments * heads, keys, chosen.pop("PROGRAMS"), chosen["BLOCK_N"])
    parts = None
    if splits > 1:
        parts = torch.empty((splits, rows, heads, head_dim + 2), dtype=torch.float32, device=q.device)
    if rows:
        launch(_decode_kernel, (segments, heads, splits), p_q=q, p_k=k, p_v=v, p_lengths=lengths, p_out=out,
               p_parts=parts, group=rows // segments, rows=rows, **strides(q=q, k=k, v=v),
               scale=scale * LOG2E, SPLITS=splits, PRECISION=precision(q.dtype), D=head_dim,
               BLOCK_Q=max(16, triton.next_power_of_2(rows // segments)), **chosen)
    if parts is not None:
        launch(_merge_kernel, (rows * heads,), p_parts=parts, p_out=out, items=rows * heads, SPLITS=splits,
               BLOCK_S=splits, D=head_dim, **merging)
    return out


def _splits(programs: int, length: int, wanted: int, tile: int) -> int:
    """Return the splits of the keys, a power of two: `wanted` programs, but at most one split per full tile."""
    splits = 1
    while splits * 2 * programs <= wanted and splits * 2 * tile <= length:
        splits *= 2
    return splits


def cached(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Arguments and result as `blip_kernels.cached_attention`; heads are 32, 64 or 128 wide."""
    q, k, v = map(_in_heads, (q, k, v))
    slots = slots if slots.stride(1) == 1 else slots.contiguous()
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    launch(_cached_kernel, (rows, heads), p_q=q, p_k=k, p_v=v, p_slots=slots, p_lengths=lengths.contiguous(),
           p_out=out, **strides(q=q, k=k, v=v), s_slots=slots.stride(0), scale=scale * LOG2E, D=head_dim,
           **_config("cached", q))
    return out


def _in_heads(x: Tensor) -> Tensor:
    """Return x [..., head_dim] itself if head_dim is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(name: str, q: Tensor) -> dict[str, int]:
    width = "float32" if q.dtype == torch.float32 else "16 bit"
    return config("decode_attention", f"{name}, head_dim {q.shape[-1]}, {width}", generation(q.device))


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for `blip_kernels.compiled.aot`.

    They are three beams of few and of many images of 577 tokens (layer 0 of 12), 20 samples of an image, and
    the tokens so far of all beams.
    """
    for head_dim in (32, 64, 128):
        for images, each in ((1, 3), (8, 3), (256, 3), (8, 20)):
            kv = torch.empty((12, 2, images, 12, 577, head_dim), dtype=dtype, device="meta").transpose(3, 4)
            q = torch.empty((images * each, 12, head_dim), dtype=dtype, device="meta")
            lengths = torch.empty(images, dtype=torch.int32, device="meta")
            call = partial(decode, q, kv[0, 0], kv[0, 1], lengths, head_dim**-0.5)
            yield f"decode, head_dim {head_dim}, {images} images" + (", 20 rows" if each > 16 else ""), call
        cache = torch.empty((12, 2, 12, 24 * 32, head_dim), dtype=dtype, device="meta").transpose(2, 3)
        q = torch.empty((24, 12, head_dim), dtype=dtype, device="meta")
        slots = torch.empty((24, 20), dtype=torch.int64, device="meta")
        lengths = torch.empty(24, dtype=torch.int32, device="meta")
        yield (f"cached, head_dim {head_dim}",
               partial(cached, q, cache[0, 0], cache[0, 1], slots, lengths, head_dim**-0.5))
