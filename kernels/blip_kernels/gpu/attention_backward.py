"""The backward kernels of `gpu/attention_kernels.py`: dq by tiles of queries, dk and dv by tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from blip_kernels.gpu.dropout import keep
from blip_kernels.gpu.streaming import KERNEL_LN2
from blip_kernels.gpu.tiles import rows_of_tile


@triton.jit
def _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, lo, hi, n_kv, shift, scale,
              seed, i_head, o_row, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
              DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
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
            b_keep = keep(seed, i_head, o_row, start, BLOCK_N, threshold)
            b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_kernel(p_q, p_k, p_v, p_out, p_do, p_lse, p_delta, p_dq, p_tiles, p_q_offsets, p_kv_offsets, n_rows,
              s_q, s_qh, s_k, s_kh, s_v, s_vh, s_o, s_oh, scale, seed, threshold, keep_scale, D: tl.constexpr,
              CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """dq of a tile of queries, and their δ for `dkv_kernel`. out, dout and dq have the strides s_o, s_oh."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    row, q_first, n_q, kv_first, n_kv = rows_of_tile(  # pyright: ignore[reportGeneralTypeIssues]
        p_tiles, p_q_offsets, p_kv_offsets, i_tile, i_segment)
    o_q = row + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_q = o_q < n_q
    o_row = q_first + o_q
    p_k += kv_first.to(tl.int64) * s_k + i_head * s_kh
    p_v += kv_first.to(tl.int64) * s_v + i_head * s_vh
    b_q = tl.load(p_q + i_head * s_qh + o_row[:, None].to(tl.int64) * s_q + o_d[None, :], mask=m_q[:, None],
                  other=0.0)
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
    acc = _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, 0, whole, n_kv, shift,
                    scale, seed, i_head, o_row, threshold, keep_scale, False, CAUSAL, DROPOUT, PRECISION,
                    BLOCK_N)
    acc = _dq_tiles(acc, b_q, b_do, b_lse, b_delta, p_k, p_v, s_k, s_v, o_q, o_n, o_d, whole, end, n_kv,
                    shift, scale, seed, i_head, o_row, threshold, keep_scale, True, CAUSAL, DROPOUT,
                    PRECISION, BLOCK_N)
    tl.store(p_dq + o_out, (acc * (scale * KERNEL_LN2)).to(p_dq.dtype.element_ty), mask=m_q[:, None])


@triton.jit
def _dkv_tiles(acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d, lo, hi, n_q,
               shift, scale, seed, i_head, q_first, column, threshold, keep_scale, MASKED: tl.constexpr,
               CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):
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
            b_keep = tl.trans(keep(seed, i_head, q_first + o_q, column, BLOCK_N, threshold))
            b_pv = tl.where(b_keep, b_p * keep_scale, 0.0)
            b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
        acc_v = tl.dot(b_pv.to(b_do.dtype), b_do, acc_v, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        acc_k = tl.dot(b_ds.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def dkv_kernel(p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_tiles, p_q_offsets, p_kv_offsets, n_rows,
               s_q, s_qh, s_k, s_kh, s_v, s_vh, s_o, s_oh, s_dk, s_dkh, scale, seed, threshold, keep_scale,
               D: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of a tile of keys. Both have the strides s_dk, s_dkh."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment = tl.load(p_tiles + 2 * i_tile)
    if i_segment < 0:
        return
    key, q_first, n_q, kv_first, n_kv = rows_of_tile(  # pyright: ignore[reportGeneralTypeIssues]
        p_tiles, p_q_offsets, p_kv_offsets, i_tile, i_segment)
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
    # Queries `first` to `whole` cross the diagonal; from there to the last full tile, each sees all of these
    # keys.
    first, whole = n_q * 0, n_q * 0
    if CAUSAL:
        first = tl.maximum(key - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.minimum(tl.maximum(key + BLOCK_N - 1 - shift + BLOCK_M - 1, 0) // BLOCK_M * BLOCK_M, n_q)
        acc_k, acc_v = _dkv_tiles(acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m,
                                  o_d, first, whole, n_q, shift, scale, seed, i_head, q_first, key, threshold,
                                  keep_scale, True, CAUSAL, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
    full = tl.maximum(n_q // BLOCK_M * BLOCK_M, whole)
    acc_k, acc_v = _dkv_tiles(acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d,
                              whole, full, n_q, shift, scale, seed, i_head, q_first, key, threshold,
                              keep_scale, False, CAUSAL, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
    acc_k, acc_v = _dkv_tiles(acc_k, acc_v, b_k, b_v, p_q, p_do, p_lse, p_delta, s_q, s_o, o_key, o_m, o_d,
                              full, n_q, n_q, shift, scale, seed, i_head, q_first, key, threshold, keep_scale,
                              True, CAUSAL, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
    o_out = i_head * s_dkh + o_kv * s_dk + o_d[None, :]
    tl.store(p_dk + o_out, (acc_k * (scale * KERNEL_LN2)).to(p_dk.dtype.element_ty), mask=m_key[:, None])
    tl.store(p_dv + o_out, acc_v.to(p_dv.dtype.element_ty), mask=m_key[:, None])
