"""Triton kernels of attention over segments: forward, and a backward of two kernels that write each gradient once.

Scheduling. A tile is a run of rows of one segment; `tiles_of` lists all tiles on the GPU, and programs behind the end
of the list return at once. One program does one tile of one head, tiles of a segment side by side so that they meet its
keys in the cache:

- 577 × 577 (image attention): five tiles a head and image in the forward, 64 images × 12 heads give 3,840 programs;
- many short texts: the rows of a tile follow from the mean length (`_config`), so that a text of 14 tokens takes a
  tile of 16 rows, and a thousand texts × 12 heads make 12,000 programs;
- few queries over long keys (an image's texts): programs are as few as query tiles × heads in the forward and in dq,
  but dk and dv are tiled over the keys. One step of generation, with even fewer queries, splits the keys as well: that
  is `decode_attention`.

Tiles of keys that every query row sees whole run in a loop without masks; what is left (the end of a segment, causal
diagonals) in a second loop that masks.

    s = scale · q kᵀ,  p = exp(s − lse),  out = dropout(p) v
    δ = Σ dout · out,  dp = dropout(dout vᵀ),  ds = p · (dp − δ),  dq = scale · ds k,  dk = scale · dsᵀ q,
    dv = dropout(p)ᵀ dout

Exponentials are powers of two: logits carry the factor log2(e), the log-sum-exp that is kept is base 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.gpu.configs import config
from blip_kernels.gpu.launch import generation, launch
from blip_kernels.gpu.tiles import tiles_of

LOG2E = 1.4426950408889634
SHORT_TILE = 16  # rows of the other side's tiles where segments are shorter than a whole tile


@triton.jit
def _keep(seed, i_head, o_row, column, COLUMNS: tl.constexpr, threshold):
    """[rows, COLUMNS] bool: which weights dropout keeps. One Philox call gives eight columns 16 bits each, word w's low
    half before its high one; o_row and column count within all rows and within the segment's keys."""
    o_group = column // 8 + tl.arange(0, COLUMNS // 8)
    c0 = (o_group[None, :] + tl.zeros_like(o_row)[:, None]).to(tl.uint32)
    c1 = (o_row[:, None] + tl.zeros_like(o_group)[None, :]).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + i_head.to(tl.uint32), zero, 7)
    even = tl.join(w0, w2)  # joins nest: the last one varies fastest
    odd = tl.join(w1, w3)
    words = tl.join(even, odd)  # [rows, groups, (0, 2), (0, 1)] → words 0, 1, 2, 3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [o_row.shape[0], COLUMNS]).to(tl.int32) >= threshold


@triton.jit
def _forward_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, o_q, o_n, o_d, lo, hi, n_kv, shift, scale, seed, i_head,
                   o_row, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Online softmax over keys lo to hi; query o_q of the tile sees keys up to o_q + shift where causal."""
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        o_key = start + o_n
        p_b_k = p_k + start.to(tl.int64) * s_k + (o_n[None, :] * s_k + o_d[:, None])
        p_b_v = p_v + start.to(tl.int64) * s_v + (o_n[:, None] * s_v + o_d[None, :])
        if MASKED:
            b_k = tl.load(p_b_k, mask=o_key[None, :] < n_kv, other=0.0)
            b_v = tl.load(p_b_v, mask=o_key[:, None] < n_kv, other=0.0)
        else:
            b_k = tl.load(p_b_k)
            b_v = tl.load(p_b_v)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        if MASKED:
            m_s = o_key[None, :] < n_kv
            if CAUSAL:
                m_s = m_s & (o_key[None, :] <= o_q[:, None] + shift)
            b_s = tl.where(m_s, b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        # A row that has seen no key yet keeps a finite maximum: −∞ − (−∞) is not a number.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        b_p = tl.exp2(b_s * scale - safe_max[:, None])
        correction = tl.exp2(b_max - safe_max)
        b_sum = b_sum * correction + tl.sum(b_p, 1)
        acc = acc * correction[:, None]
        if DROPOUT:
            b_keep = _keep(seed, i_head, o_row, start, BLOCK_N, threshold)
            b_p = tl.where(b_keep, b_p * keep_scale, 0.0)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        b_max = new_max
    return acc, b_max, b_sum


@triton.jit
def _forward_kernel(p_q, p_k, p_v, p_out, p_lse, p_tiles, p_q_offsets, p_kv_offsets, n_rows, s_q, s_qh, s_k, s_kh, s_v,
                    s_vh, s_o, s_oh, scale, seed, threshold, keep_scale, D: tl.constexpr, CAUSAL: tl.constexpr,
                    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    row = tl.load(p_tiles + 2 * i_tile + 1)
    q_first, kv_first = tl.load(p_q_offsets + i_segment), tl.load(p_kv_offsets + i_segment)
    n_q = tl.load(p_q_offsets + i_segment + 1) - q_first
    n_kv = tl.load(p_kv_offsets + i_segment + 1) - kv_first
    o_q = row + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_q = o_q < n_q
    p_q += q_first.to(tl.int64) * s_q + i_head * s_qh
    p_k += kv_first.to(tl.int64) * s_k + i_head * s_kh
    p_v += kv_first.to(tl.int64) * s_v + i_head * s_vh
    b_q = tl.load(p_q + o_q[:, None].to(tl.int64) * s_q + o_d[None, :], mask=m_q[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    shift = n_kv - n_q
    whole, end = n_kv, n_kv
    if CAUSAL:
        whole = tl.minimum(tl.maximum(row + shift + 1, 0), n_kv)
        end = tl.minimum(tl.maximum(row + BLOCK_M + shift, 0), n_kv)
    whole = whole // BLOCK_N * BLOCK_N
    o_row = q_first + o_q
    acc, b_max, b_sum = _forward_tiles(
        acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, o_q, o_n, o_d, 0, whole, n_kv, shift, scale, seed, i_head, o_row,
        threshold, keep_scale, False, CAUSAL, DROPOUT, PRECISION, BLOCK_N)
    acc, b_max, b_sum = _forward_tiles(
        acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, o_q, o_n, o_d, whole, end, n_kv, shift, scale, seed, i_head, o_row,
        threshold, keep_scale, True, CAUSAL, DROPOUT, PRECISION, BLOCK_N)
    # Rows that see no key: zeros, and a log-sum-exp of +∞ with which the backward's weights vanish.
    seen = b_sum > 0
    acc = acc / tl.where(seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(seen, b_max + tl.log2(tl.where(seen, b_sum, 1.0)), float("inf"))
    p_out += q_first.to(tl.int64) * s_o + i_head * s_oh
    tl.store(p_out + o_q[:, None].to(tl.int64) * s_o + o_d[None, :], acc.to(p_out.dtype.element_ty), mask=m_q[:, None])
    tl.store(p_lse + i_head * n_rows + o_row, b_lse, mask=m_q)


@triton.jit
def _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, lo, hi, n_kv, shift, scale, seed,
              i_head, o_row, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq / scale of keys lo to hi."""
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        o_key = start + o_n
        p_b_k = p_k + start.to(tl.int64) * s_k + (o_n[:, None] * s_k + o_d[None, :])
        p_b_v = p_v + start.to(tl.int64) * s_v + (o_n[:, None] * s_v + o_d[None, :])
        if MASKED:
            b_k = tl.load(p_b_k, mask=o_key[:, None] < n_kv, other=0.0)
            b_v = tl.load(p_b_v, mask=o_key[:, None] < n_kv, other=0.0)
        else:
            b_k = tl.load(p_b_k)
            b_v = tl.load(p_b_v)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if MASKED:
            m_s = o_key[None, :] < n_kv
            if CAUSAL:
                m_s = m_s & (o_key[None, :] <= o_q[:, None] + shift)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if DROPOUT:
            b_keep = _keep(seed, i_head, o_row, start, BLOCK_N, threshold)
            b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dq_kernel(p_q, p_k, p_v, p_out, p_do, p_lse, p_delta, p_dq, p_tiles, p_q_offsets, p_kv_offsets, n_rows, s_q, s_qh,
               s_k, s_kh, s_v, s_vh, s_o, s_oh, scale, seed, threshold, keep_scale, D: tl.constexpr,
               CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):
    """dq of a tile of queries, and their δ for the kernel of dk and dv. out, dout and dq have the strides s_o, s_oh."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    row = tl.load(p_tiles + 2 * i_tile + 1)
    q_first, kv_first = tl.load(p_q_offsets + i_segment), tl.load(p_kv_offsets + i_segment)
    n_q = tl.load(p_q_offsets + i_segment + 1) - q_first
    n_kv = tl.load(p_kv_offsets + i_segment + 1) - kv_first
    o_q = row + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_q = o_q < n_q
    o_row = q_first + o_q
    p_k += kv_first.to(tl.int64) * s_k + i_head * s_kh
    p_v += kv_first.to(tl.int64) * s_v + i_head * s_vh
    b_q = tl.load(p_q + i_head * s_qh + o_row[:, None].to(tl.int64) * s_q + o_d[None, :], mask=m_q[:, None], other=0.0)
    o_out = i_head * s_oh + o_row[:, None].to(tl.int64) * s_o + o_d[None, :]
    b_do = tl.load(p_do + o_out, mask=m_q[:, None], other=0.0)
    b_out = tl.load(p_out + o_out, mask=m_q[:, None], other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + i_head * n_rows + o_row, b_delta, mask=m_q)
    b_lse = tl.load(p_lse + i_head * n_rows + o_row, mask=m_q, other=float("inf"))
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    shift = n_kv - n_q
    whole, end = n_kv, n_kv
    if CAUSAL:
        whole = tl.minimum(tl.maximum(row + shift + 1, 0), n_kv)
        end = tl.minimum(tl.maximum(row + BLOCK_M + shift, 0), n_kv)
    whole = whole // BLOCK_N * BLOCK_N
    acc = _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, 0, whole, n_kv, shift, scale,
                    seed, i_head, o_row, threshold, keep_scale, False, CAUSAL, DROPOUT, PRECISION, BLOCK_N)
    acc = _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, whole, end, n_kv, shift, scale,
                    seed, i_head, o_row, threshold, keep_scale, True, CAUSAL, DROPOUT, PRECISION, BLOCK_N)
    tl.store(p_dq + o_out, (acc * (scale * 0.6931471805599453)).to(p_dq.dtype.element_ty), mask=m_q[:, None])


@triton.jit
def _dkv_tiles(acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d, lo, hi, n_q, shift, scale,
               seed, i_head, q_first, column, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
               DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk / scale and dv of queries lo to hi, in transposed tiles [keys, queries]."""
    for start in range(lo, hi, BLOCK_M):
        o_q = start + o_m
        p_b_q = p_q + tl.cast(start, tl.int64) * s_q + (o_m[:, None] * s_q + o_d[None, :])
        p_b_do = p_do + tl.cast(start, tl.int64) * s_o + (o_m[:, None] * s_o + o_d[None, :])
        if MASKED:
            m_q = o_q < n_q
            b_q = tl.load(p_b_q, mask=m_q[:, None], other=0.0)
            b_do = tl.load(p_b_do, mask=m_q[:, None], other=0.0)
            b_lse = tl.load(p_lse + o_q, mask=m_q, other=float("inf"))
            b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
        else:
            b_q = tl.load(p_b_q)
            b_do = tl.load(p_b_do)
            b_lse = tl.load(p_lse + o_q)
            b_delta = tl.load(p_delta + o_q)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        if MASKED and CAUSAL:
            b_p = tl.where(o_key[:, None] <= o_q[None, :] + shift, b_p, 0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_pv = b_p
        if DROPOUT:
            b_keep = tl.trans(_keep(seed, i_head, q_first + o_q, column, BLOCK_N, threshold))
            b_pv = tl.where(b_keep, b_p * keep_scale, 0.0)
            b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
        acc_v = tl.dot(b_pv.to(b_do.dtype), b_do, acc_v, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        acc_k = tl.dot(b_ds.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _dkv_kernel(p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_tiles, p_q_offsets, p_kv_offsets, n_rows, s_q, s_qh,
                s_k, s_kh, s_v, s_vh, s_o, s_oh, s_dk, s_dkh, scale, seed, threshold, keep_scale, D: tl.constexpr,
                CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):
    """dk and dv of a tile of keys. They have the strides s_dk, s_dkh."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    key = tl.load(p_tiles + 2 * i_tile + 1)
    q_first, kv_first = tl.load(p_q_offsets + i_segment), tl.load(p_kv_offsets + i_segment)
    n_q = tl.load(p_q_offsets + i_segment + 1) - q_first
    n_kv = tl.load(p_kv_offsets + i_segment + 1) - kv_first
    o_key = key + tl.arange(0, BLOCK_N)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    m_key = o_key < n_kv
    o_kv = (kv_first + o_key)[:, None].to(tl.int64)
    b_k = tl.load(p_k + i_head * s_kh + o_kv * s_k + o_d[None, :], mask=m_key[:, None], other=0.0)
    b_v = tl.load(p_v + i_head * s_vh + o_kv * s_v + o_d[None, :], mask=m_key[:, None], other=0.0)
    p_q += q_first.to(tl.int64) * s_q + i_head * s_qh
    p_do += q_first.to(tl.int64) * s_o + i_head * s_oh
    p_lse += i_head * n_rows + q_first
    p_delta += i_head * n_rows + q_first
    acc_k = tl.zeros([BLOCK_N, D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, D], tl.float32)
    shift = n_kv - n_q
    # Queries `first` to `whole` meet a diagonal; from there to the last full tile all see all of these keys.
    first, whole = n_q * 0, n_q * 0
    if CAUSAL:
        first = tl.maximum(key - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.minimum(tl.maximum(key + BLOCK_N - 1 - shift + BLOCK_M - 1, 0) // BLOCK_M * BLOCK_M, n_q)
        acc_k, acc_v = _dkv_tiles(
            acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d, first, whole, n_q, shift,
            scale, seed, i_head, q_first, key, threshold, keep_scale, True, CAUSAL, DROPOUT, PRECISION, BLOCK_M,
            BLOCK_N)
    full = tl.maximum(n_q // BLOCK_M * BLOCK_M, whole)
    acc_k, acc_v = _dkv_tiles(
        acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d, whole, full, n_q, shift, scale,
        seed, i_head, q_first, key, threshold, keep_scale, False, CAUSAL, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
    acc_k, acc_v = _dkv_tiles(
        acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d, full, n_q, n_q, shift, scale,
        seed, i_head, q_first, key, threshold, keep_scale, True, CAUSAL, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
    o_out = i_head * s_dkh + o_kv * s_dk + o_d[None, :]
    tl.store(p_dk + o_out, (acc_k * (scale * 0.6931471805599453)).to(p_dk.dtype.element_ty), mask=m_key[:, None])
    tl.store(p_dv + o_out, acc_v.to(p_dv.dtype.element_ty), mask=m_key[:, None])


def forward(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool, dropout: float,
            scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Attention of packed segments: out as q, and the log-sum-exp base 2 of the logits, float32 [heads, query rows].

    Arguments as `blip_kernels.attention`; `seed` is the dropout's. Heads are 32, 64 or 128 wide.
    """
    q, k, v = map(_rows_in_place, (q, k, v))
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    chosen = _config("forward", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    launch(_forward_kernel, (len(tiles), heads), q, k, v, out, lse, tiles, q_offsets, kv_offsets, rows,
           *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], scale * LOG2E, seed,
           *_dropout_arguments(dropout), **_constants(q, causal, dropout), **chosen)
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor,
             kv_offsets: Tensor, causal: bool, dropout: float, scale: float,
             seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `forward`, contiguous."""
    q, k, v, grad = *map(_rows_in_place, (q, k, v)), grad.contiguous()
    rows, heads, head_dim = q.shape
    delta, dq = torch.empty_like(lse), torch.empty_like(out)
    dk, dv = (torch.empty((len(k), heads, head_dim), dtype=q.dtype, device=q.device) for _ in range(2))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    numbers = (scale * LOG2E, seed, *_dropout_arguments(dropout))
    constants = _constants(q, causal, dropout)

    chosen = _config("dq", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    launch(_dq_kernel, (len(tiles), heads), q, k, v, out, grad, lse, delta, dq, tiles, q_offsets, kv_offsets, rows,
           *strides, *numbers, **constants, **chosen)

    chosen = _config("dk and dv", q, dropout, "BLOCK_N", len(k), kv_offsets)
    tiles = tiles_of(kv_offsets, len(k), chosen["BLOCK_N"])
    launch(_dkv_kernel, (len(tiles), heads), q, k, v, grad, lse, delta, dk, dv, tiles, q_offsets, kv_offsets, rows,
           *strides, *dk.stride()[:2], *numbers, **constants, **chosen)
    return dq, dk, dv


def _rows_in_place(x: Tensor) -> Tensor:
    """x [rows, heads, head_dim] as it is where head_dim lies contiguous (slices of a fused projection), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(name: str, q: Tensor, dropout: float, tiled: str, rows: int, offsets: Tensor) -> dict[str, int]:
    """The table's configuration, its tile `tiled` made to fit segments of the mean length: the smallest power of two
    that covers it, 16 at least.

    Each warp needs 16 rows of its own, or warps repeat each other's products; few warps hold small tiles only, and
    dropout's random words not even those: it keeps two warps.
    """
    width = "float32" if q.dtype == torch.float32 else "16 bit"
    launch_name = f"{name}, head_dim {q.shape[-1]}, {width}{', dropout' * (dropout > 0)}"
    chosen = config("attention", launch_name, generation(q.device))
    mean, full = rows / (len(offsets) - 1), chosen[tiled]
    while chosen[tiled] > 16 and chosen[tiled] // 2 >= mean:
        chosen[tiled] //= 2
    if chosen[tiled] < full:
        other = "BLOCK_N" if tiled == "BLOCK_M" else "BLOCK_M"
        chosen[other] = min(chosen[other], SHORT_TILE)
        chosen["num_warps"] = min(chosen["num_warps"], max(chosen[tiled] // 16, 2 if dropout else 1))
    return chosen


def _constants(q: Tensor, causal: bool, dropout: float) -> dict[str, object]:
    # float32 products keep float32's accuracy: TF32 in three passes.
    return {"D": q.shape[-1], "CAUSAL": causal, "DROPOUT": dropout > 0,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32"}


def _dropout_arguments(dropout: float) -> tuple[int, float]:
    """The 16-bit threshold below which a weight is dropped, and the factor of those kept."""
    threshold = round(dropout * 65536)
    return threshold, 65536 / (65536 - threshold)


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of launches for ahead-of-time compilation, on `meta` tensors: 64 segments, 12 heads."""
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def passes(name: str, length: int, head_dim: int, causal: bool,
               dropout: float) -> Iterator[tuple[str, Callable[[], object]]]:
        q, k, v, out, grad = (empty(64 * length, 12, head_dim) for _ in range(5))
        offsets, lse = empty(65, dtype=torch.int32), empty(12, 64 * length, dtype=torch.float32)
        options = (offsets, offsets, causal, dropout, head_dim**-0.5, 1)
        yield f"forward, {name}", partial(forward, q, k, v, *options)
        yield f"backward, {name}", partial(backward, grad, q, k, v, out, lse, *options)

    for head_dim in (32, 64, 128):
        for causal, dropout in ((False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)):
            name = f"head_dim {head_dim}{', causal' * causal}{', dropout' * (dropout > 0)}"
            yield from passes(name, 577, head_dim, causal, dropout)
    for length in (16, 32, 64):  # short texts take smaller tiles
        yield from passes(f"head_dim 64, {length} tokens", length, 64, False, 0.0)
        yield from passes(f"head_dim 64, {length} tokens, causal, dropout", length, 64, True, 0.1)
