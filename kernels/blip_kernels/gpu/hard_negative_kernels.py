"""Triton kernels of hard negatives: one streaming pass over the keys, then a small kernel merges its shares.

Tiling is as in `contrastive`: a program holds BLOCK_M rows and streams a share of the keys, with as many
shares as fill the GPU. A tile is BLOCK_N counters of the generator with four random words each, so 4 ·
BLOCK_N keys. Word w belongs to keys w, w + 4, w + 8, …, which are loaded as a sub-tile of their own.
Similarities and random numbers are then in the same registers, and nothing is shuffled. The draws do not
depend on tiles or shares: a number belongs to its row and key.

Each pair of row and key costs a quarter of a Philox block, two logarithms and an exponential, next to a
product of `width` terms. At the widths of contrastive features these set the time, not the tensor cores.
There are only rows × keys pairs of one batch, a fraction of what the loss itself streams with its queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.constants import NO_ID
from blip_kernels.gpu.configs import config
from blip_kernels.gpu.kernel_launch import INTERPRETED, generation, launch
from blip_kernels.gpu.streaming import KERNEL_LOG2E, LOG2E, cdiv, load_rows, padded_width, shares_of
from blip_kernels.random import ROUNDS

_NO_ID = tl.constexpr(NO_ID)
_NO_KEY = tl.constexpr(NO_ID - 1)  # stands for NO_ID among ids of keys, so that NO_ID equals nothing


@triton.jit
def _bits(b_word):
    """31 bits of a random word, below 2³¹ − 1."""
    return tl.minimum((b_word >> 1).to(tl.int32), 0x7FFFFFFE)


@triton.jit
def _uniform(b_bits):
    """31-bit numbers → (0, 1)."""
    return tl.minimum((b_bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)


@triton.jit
def _log2(b_x, APPROXIMATE: tl.constexpr):
    """log2: with APPROXIMATE one instruction (error 2⁻²²), else exact in twenty, for the interpreter."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32,
                                         is_pure=True, pack=1)
    return tl.math.log2(b_x)


@triton.jit
def _waiting_time(b_v, APPROXIMATE: tl.constexpr):
    """−log2(1 − v); by its series for small v, where the winning draws lie."""
    b_series = b_v * (KERNEL_LOG2E
                      + b_v * (KERNEL_LOG2E / 2 + b_v * (KERNEL_LOG2E / 3 + b_v * (KERNEL_LOG2E / 4))))
    return tl.where(b_v < 0.015625, b_series, -_log2(1.0 - b_v, APPROXIMATE))


@triton.jit
def _products(p_q, b_q, n_here, p_k, n_left, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """q · k [BLOCK_M, BLOCK_N], every fourth key from p_k on, n_left keys. Reloads q if CHUNK < BLOCK_D."""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, BLOCK_D, CHUNK):
        b_x = b_q if CHUNK == BLOCK_D else load_rows(p_q, n_here, first, D, BLOCK_D, BLOCK_M, CHUNK, True)
        o_row, o_d = tl.arange(0, BLOCK_N)[:, None], first + tl.arange(0, CHUNK)[None, :]
        b_k = tl.load(p_k + o_row * (4 * D) + o_d, mask=(o_row < n_left) & (o_d < D), other=0.0)
        b_s = tl.dot(b_x, tl.trans(b_k), b_s, input_precision=PRECISION)
    return b_s


@triton.jit(do_not_specialize=["seed", "i_stream", "n_rows", "n_keys", "n_share", "first_own"])
def _draw_kernel(p_q, p_keys, p_scale, p_ids, p_key_ids, p_reals, p_indices, seed, i_stream, n_rows, n_keys,
                 n_share, first_own, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ROUNDS: tl.constexpr,
                 BY_ID: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Draw from one share of the keys.

    Writes reals [shares, 4, n_rows]: maximum, Σ exp, Σ exp of admissible keys, best Gumbel score; and indices
    [shares, 4, n_rows]: number of admissible keys, key of the best score, least random number, key of that
    number.
    """
    i_m, i_share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_here = (n_rows - i_m * BLOCK_M).to(tl.int32)
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < n_rows
    p_q += i_m * BLOCK_M * D
    b_q = 0.0
    if CHUNK == BLOCK_D:
        b_q = load_rows(p_q, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
    scale = tl.load(p_scale)
    b_id = o_row.to(tl.int32) + first_own
    if BY_ID:
        b_id = tl.load(p_ids + o_row, mask=m_row, other=0)
    b_top, b_count = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_sum, b_admitted = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    # Winners are kept per column until the end: a comparison per element instead of a reduction per tile.
    b_best, b_least = (tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32),
                       tl.full([BLOCK_M, BLOCK_N], 0x7FFFFFFF, tl.int32))
    b_drawn, b_even = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32), tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    n_tiles = tl.cdiv(n_keys, 4 * BLOCK_N)
    for i_tile in range(i_share * n_share, tl.minimum(i_share * n_share + n_share, n_tiles)):
        o_counter = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, o_counter[None, :] + tl.zeros([BLOCK_M, 1], tl.int32),
                                           o_row.to(tl.int32)[:, None] + tl.zeros([1, BLOCK_N], tl.int32),
                                           i_stream, 0, n_rounds=ROUNDS)
        for i_word in tl.static_range(4):
            if i_word == 0:
                b_word = b_w0
            elif i_word == 1:
                b_word = b_w1
            elif i_word == 2:
                b_word = b_w2
            else:
                b_word = b_w3
            o_key = 4 * o_counter + i_word
            first = tl.cast(i_tile, tl.int64) * (4 * BLOCK_N) + i_word
            n_left = (n_keys - first + 3) // 4
            b_s = _products(p_q, b_q, n_here, p_keys + first * D, n_left, D, BLOCK_D, CHUNK, BLOCK_M, BLOCK_N,
                            PRECISION) * scale
            m_key = o_key < n_keys
            b_key_id = o_key
            if BY_ID:
                b_key_id = tl.load(p_key_ids + o_key, mask=m_key, other=_NO_ID)
                b_key_id = tl.where(b_key_id == _NO_ID, _NO_KEY, b_key_id)
            m_admissible = m_key[None, :] & (b_id[:, None] != b_key_id[None, :])
            b_seen = tl.where(m_key[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_seen, 1))
            b_weight, b_shrink = tl.math.exp2(b_seen - b_new[:, None]), tl.math.exp2(b_top - b_new)
            b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
            b_admitted = b_admitted * b_shrink + tl.sum(tl.where(m_admissible, b_weight, 0.0), 1)
            b_count += tl.sum(tl.where(m_admissible, 1.0, 0.0), 1)
            b_top = b_new

            b_bits = _bits(b_word)
            b_score = b_s - _log2(_waiting_time(_uniform(b_bits), APPROXIMATE), APPROXIMATE)
            m_better = m_admissible & (b_score > b_best)
            b_best, b_drawn = tl.where(m_better, b_score, b_best), tl.where(m_better, o_key[None, :], b_drawn)
            m_better = m_admissible & (b_bits < b_least)
            b_least, b_even = tl.where(m_better, b_bits, b_least), tl.where(m_better, o_key[None, :], b_even)
    b_score, b_bits = tl.max(b_best, 1), tl.min(b_least, 1)
    b_first = tl.min(tl.where(b_best == b_score[:, None], b_drawn, 0x7FFFFFFF), 1)
    b_first_even = tl.min(tl.where(b_least == b_bits[:, None], b_even, 0x7FFFFFFF), 1)
    p_real = p_reals + i_share.to(tl.int64) * 4 * n_rows + o_row
    tl.store(p_real, b_top, mask=m_row)
    tl.store(p_real + n_rows, b_sum, mask=m_row)
    tl.store(p_real + 2 * n_rows, b_admitted, mask=m_row)
    tl.store(p_real + 3 * n_rows, b_score, mask=m_row)
    p_index = p_indices + i_share.to(tl.int64) * 4 * n_rows + o_row
    tl.store(p_index, b_count.to(tl.int32), mask=m_row)
    tl.store(p_index + n_rows, b_first, mask=m_row)
    tl.store(p_index + 2 * n_rows, b_bits, mask=m_row)
    tl.store(p_index + 3 * n_rows, b_first_even, mask=m_row)


@triton.jit(do_not_specialize=["seed", "i_stream", "n_rows", "n_shares"])
def _merge_draws_kernel(p_reals, p_indices, p_out, floor, seed, i_stream, n_rows, n_shares,
                        ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """Merge shares in order, then choose between the softmax's draw and the uniform one: int64 [n_rows]."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    b_top, b_best = tl.full([ROWS], -1e30, tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    b_sum, b_admitted = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    b_count, b_least = tl.zeros([ROWS], tl.int32), tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    b_drawn, b_even = tl.full([ROWS], -1, tl.int32), tl.full([ROWS], -1, tl.int32)
    for i_share in range(n_shares):
        p_real = p_reals + tl.cast(i_share, tl.int64) * 4 * n_rows + o_row
        p_index = p_indices + tl.cast(i_share, tl.int64) * 4 * n_rows + o_row
        b_part = tl.load(p_real, mask=m_row, other=0.0)
        b_new = tl.maximum(b_top, b_part)
        b_old, b_add = tl.math.exp2(b_top - b_new), tl.math.exp2(b_part - b_new)
        b_sum = b_sum * b_old + b_add * tl.load(p_real + n_rows, mask=m_row, other=1.0)
        b_admitted = b_admitted * b_old + b_add * tl.load(p_real + 2 * n_rows, mask=m_row, other=0.0)
        b_top = b_new
        b_count += tl.load(p_index, mask=m_row, other=0)
        b_value = tl.load(p_real + 3 * n_rows, mask=m_row, other=0.0)
        b_drawn = tl.where(b_value > b_best, tl.load(p_index + n_rows, mask=m_row, other=-1), b_drawn)
        b_best = tl.where(b_value > b_best, b_value, b_best)
        b_value = tl.load(p_index + 2 * n_rows, mask=m_row, other=0)
        b_even = tl.where(b_value < b_least, tl.load(p_index + 3 * n_rows, mask=m_row, other=-1), b_even)
        b_least = tl.minimum(b_least, b_value)
    b_word, _, _, _ = tl.philox(seed, tl.full([ROWS], -1, tl.int32), o_row.to(tl.int32), i_stream, 0,
                                n_rounds=ROUNDS)
    b_share = b_admitted / b_sum
    m_softmax = _uniform(_bits(b_word)) * (b_share + floor * b_count.to(tl.float32)) <= b_share
    tl.store(p_out + o_row, tl.where(m_softmax & (b_drawn >= 0), b_drawn, b_even).to(tl.int64), mask=m_row)


def draw(q: Tensor, keys: Tensor, temperature: Tensor, floor: float, seed: int, stream: int,
         ids: Tensor | None, key_ids: Tensor | None, first_own: int) -> Tensor:
    """Draw a key for each row, int64 [rows], or −1.

    Arguments must be contiguous and checked. With `ids` None, row i excludes key i + `first_own`.
    """
    (rows, width), device = q.shape, q.device
    block = padded_width(width)
    bits = "float32" if q.dtype == torch.float32 else "16 bit"
    meta = config("hard_negatives", f"draw, width {max(block, 64)}, {bits}", generation(device))
    chunk = min(meta.pop("CHUNK"), block)
    blocks, tiles = cdiv(rows, meta["BLOCK_M"]), cdiv(len(keys), 4 * meta["BLOCK_N"])
    shares = shares_of(blocks, tiles, device, waves=4)
    reals = torch.empty(shares, 4, rows, dtype=torch.float32, device=device)
    indices = torch.empty(shares, 4, rows, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    launch(_draw_kernel, (blocks, shares), p_q=q, p_keys=keys, p_scale=LOG2E / temperature.float().reshape(1),
           p_ids=ids, p_key_ids=key_ids, p_reals=reals, p_indices=indices, seed=seed, i_stream=stream,
           n_rows=rows, n_keys=len(keys), n_share=cdiv(tiles, max(shares, 1)), first_own=first_own, D=width,
           BLOCK_D=block, CHUNK=chunk, PRECISION="tf32x3", ROUNDS=ROUNDS, BY_ID=ids is not None,
           APPROXIMATE=not INTERPRETED, **meta)
    merge = config("hard_negatives", "merge", generation(device))
    launch(_merge_draws_kernel, (cdiv(rows, merge["ROWS"]),), p_reals=reals, p_indices=indices, p_out=out,
           floor=floor, seed=seed, i_stream=stream, n_rows=rows, n_shares=shares, ROUNDS=ROUNDS, **merge)
    return out


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, call) of launches to compile, on `meta` tensors: 512 rows, keys of 32 ranks."""
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for width in (64, 128, 256):
        for kind in ("pair", "id"):
            q, keys, temperature = empty(512, width), empty(16384, width), empty(1, dtype=torch.float32)
            ids, key_ids = ((empty(512, dtype=torch.int64), empty(16384, dtype=torch.int64)) if kind == "id"
                            else (None, None))
            yield (f"draw, width {width}, excluded by {kind}",
                   partial(draw, q, keys, temperature, 1e-4, 1 << 61, 0, ids, key_ids, 0))
