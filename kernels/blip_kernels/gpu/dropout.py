"""Which attention weights dropout keeps. The random bits are recomputed wherever they are needed."""

from __future__ import annotations

import triton
import triton.language as tl

from blip_kernels.random import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def keep(seed, i_head, o_row, column, COLUMNS: tl.constexpr, threshold):
    """Which weights dropout keeps, bool [rows, COLUMNS].

    One Philox call gives eight columns 16 bits each; the low half of a word comes before its high half. o_row
    counts all rows, column the segment's keys.
    """
    o_group = column // 8 + tl.arange(0, COLUMNS // 8)
    c0 = (o_group[None, :] + tl.zeros_like(o_row)[:, None]).to(tl.uint32)
    c1 = (o_row[:, None] + tl.zeros_like(o_group)[None, :]).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + i_head.to(tl.uint32), zero, _ROUNDS)
    even = tl.join(w0, w2)  # joins nest: the last one varies fastest
    odd = tl.join(w1, w3)
    words = tl.join(even, odd)  # [rows, groups, (0, 2), (0, 1)] → words 0, 1, 2, 3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [o_row.shape[0], COLUMNS]).to(tl.int32) >= threshold
