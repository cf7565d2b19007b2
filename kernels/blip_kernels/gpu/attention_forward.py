"""The forward kernel of `gpu/attention_kernels.py`: online softmax over tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from blip_kernels.gpu.dropout import keep
from blip_kernels.gpu.exponentials import row_sum, scaled, weights
from blip_kernels.gpu.tiles import rows_of_tile

# Keys of a masked tile if whole tiles have 256: masking would waste half of those.
MASKED_TILE = tl.constexpr(64)


@triton.jit
def _forward_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, tiles_k, tiles_v, kv_first, o_q, o_d, lo, hi,
                   n_kv, shift, scale, seed, i_head, o_row, threshold, keep_scale, MASKED: tl.constexpr,
                   CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_N: tl.constexpr):
    """Online softmax over keys lo to hi; with CAUSAL, query o_q of the tile sees keys up to o_q + shift."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        o_key = start + o_n
        if tiles_k is not None:
            b_k = tl.trans(tiles_k.load([kv_first + start, i_head.to(tl.int32) * o_d.shape[0]]))
            b_v = tiles_v.load([kv_first + start, i_head.to(tl.int32) * o_d.shape[0]])
        else:
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
        correction = tl.exp2(b_max - safe_max)
        if tiles_k is not None:
            b_p = weights(b_s, scale, safe_max)
            b_sum = b_sum * correction + row_sum(b_p)
            acc = scaled(acc, correction)
        else:
            b_p = tl.exp2(b_s * scale - safe_max[:, None])
            b_sum = b_sum * correction + tl.sum(b_p, 1)
            acc = acc * correction[:, None]
        if DROPOUT:
            b_keep = keep(seed, i_head, o_row, start, BLOCK_N, threshold)
            b_p = tl.where(b_keep, b_p * keep_scale, 0.0)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        b_max = new_max
    return acc, b_max, b_sum


@triton.jit
def forward_kernel(p_q, p_k, p_v, tiles_k, tiles_v, p_out, p_lse, p_tiles, p_q_offsets, p_kv_offsets, n_rows,
                   s_q, s_qh, s_k, s_kh, s_v, s_vh, s_o, s_oh, scale, seed, threshold, keep_scale,
                   D: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute a tile of queries.

    `tiles_k`, `tiles_v`: descriptors of k and v [rows, heads × D] for whole tiles, or None.
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    row, q_first, n_q, kv_first, n_kv = rows_of_tile(  # pyright: ignore[reportGeneralTypeIssues]
        p_tiles, p_q_offsets, p_kv_offsets, i_tile, i_segment)
    o_q = row + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
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
    acc, b_max, b_sum = _forward_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, tiles_k, tiles_v, kv_first,
                                       o_q, o_d, 0, whole, n_kv, shift, scale, seed, i_head, o_row, threshold,
                                       keep_scale, False, CAUSAL, DROPOUT, PRECISION, BLOCK_N)
    acc, b_max, b_sum = _forward_tiles(acc, b_max, b_sum, b_q, p_k, p_v, s_k, s_v, None, None, kv_first, o_q,
                                       o_d, whole, end, n_kv, shift, scale, seed, i_head, o_row, threshold,
                                       keep_scale, True, CAUSAL, DROPOUT, PRECISION,
                                       MASKED_TILE if BLOCK_N > 128 else BLOCK_N)
    # Rows that see no key get zeros, and a log-sum-exp of +∞, which makes their weights 0 in the backward.
    seen = b_sum > 0
    acc = acc / tl.where(seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(seen, b_max + tl.log2(tl.where(seen, b_sum, 1.0)), float("inf"))
    p_out += q_first.to(tl.int64) * s_o + i_head * s_oh
    tl.store(p_out + o_q[:, None].to(tl.int64) * s_o + o_d[None, :], acc.to(p_out.dtype.element_ty),
             mask=m_q[:, None])
    tl.store(p_lse + i_head * n_rows + o_row, b_lse, mask=m_q)
