"""Triton kernels of the contrastive loss: a streaming pass over the keys for the loss, one for each gradient.

Tiling. A program holds BLOCK_M rows of q and q_m and streams a share of the keys past them: tiles of the
batch's keys, then tiles of the queue's, in one loop that chooses between two base pointers. Full tiles run
without masks. The remainders of batch and queue are a share of their own, a second launch with masks, so that
masks take no registers from the main loop. Nothing of size rows × keys leaves a program:

             keys: batch │ queue ──────────────▶
    rows  ┌──────────────┬──────────────┬─────┐
    q,q_m │   share 0    │   share 1    │  …  │  each: max, Σ exp of both rows of logits, Σ exp(s_m) · s
          └──────────────┴──────────────┴─────┘  then a small kernel merges the shares, in order: deterministic

There are as many shares as fill the GPU (`shares_of`): 4,096 rows alone make 32 programs, with 4 shares 128;
64 rows get one share per multiprocessor. The gradient of the queries uses the same tiling, with dq in
registers. Each share writes its part once, in float32, and a merging kernel adds the parts. There is at most
one part per multiprocessor, so the size of the GPU bounds their memory, not the size of the batch. The
gradient of the batch's keys exchanges the sides: a program holds BLOCK_M keys and streams q and q_m past
them. There are no atomics.

The big loops ignore positives, whether pairs or equal ids: the merging kernels add them
(`contrastive_merge`). Gradients of softmax weights enter the tensor cores with a factor of 2¹⁴, which keeps
weights of 1e-5 out of float16's subnormal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.gpu.configs import config
from blip_kernels.gpu.contrastive_merge import merge_forward, merge_gradient, positive_items
from blip_kernels.gpu.kernel_launch import generation, launch
from blip_kernels.gpu.streaming import LOG2E, cdiv, load_rows, padded_width, shares_of

SHIFT = 14  # gradients of logits lie in [−1, 1]; in the big loops they are 2¹⁴ times as large
SIZES = ["n_rows", "n_batch", "n_queue", "n_share", "i_first"]  # one compiled kernel for all their values


@triton.jit
def _store_rows(p_x, b_x, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    o_row, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(p_x + o_row * D + o_d, b_x, mask=(o_row < n_rows) & (o_d < D))


@triton.jit
def _load_values(p_x, n_rows, ROWS: tl.constexpr, MASKED: tl.constexpr):
    o_row = tl.arange(0, ROWS)
    if MASKED:
        return tl.load(p_x + o_row, mask=o_row < n_rows, other=0.0)
    return tl.load(p_x + o_row)


@triton.jit
def _share(n_tiles, n_share, n_tails, MASKED: tl.constexpr):
    """Range of this program's tiles: n_share full tiles, or with MASKED all tails."""
    if MASKED:
        return 0, n_tails
    first = tl.program_id(1) * n_share
    return first, tl.minimum(first + n_share, n_tiles)


@triton.jit
def _keys_tile(p_batch, p_queue, n_batch, n_queue, i_tile, D: tl.constexpr, BLOCK_N: tl.constexpr,
               MASKED: tl.constexpr):
    """Full tile i of the keys, the batch's before the queue's; with MASKED the tail of batch (0) or queue (1).

    Returns a pointer to its first key, and how many keys it holds.
    """
    n_batch_tiles = n_batch // BLOCK_N
    if MASKED:
        from_batch = i_tile == 0
        n_part = tl.where(from_batch, n_batch, n_queue)
        n_left = n_part % BLOCK_N
        first = n_part - n_left
    else:
        from_batch = i_tile < n_batch_tiles
        n_left = BLOCK_N
        first = (i_tile - tl.where(from_batch, 0, n_batch_tiles)) * BLOCK_N
    return tl.where(from_batch, p_batch, p_queue) + tl.cast(first, tl.int64) * D, n_left


@triton.jit
def _logits(p_x, p_xm, n_x, p_y, p_ym, n_y, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """x yᵀ, x_m y_mᵀ [BLOCK_M, BLOCK_N], CHUNK columns at a time: float32, split in two, fills registers."""
    b_s, b_sm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, BLOCK_D, CHUNK):
        b_x = load_rows(p_x, n_x, first, D, BLOCK_D, BLOCK_M, CHUNK, True)
        b_xm = load_rows(p_xm, n_x, first, D, BLOCK_D, BLOCK_M, CHUNK, True)
        b_y = load_rows(p_y, n_y, first, D, BLOCK_D, BLOCK_N, CHUNK, MASKED)
        b_ym = load_rows(p_ym, n_y, first, D, BLOCK_D, BLOCK_N, CHUNK, MASKED)
        b_s = tl.dot(b_x, tl.trans(b_y), b_s, input_precision=PRECISION)
        b_sm = tl.dot(b_xm, tl.trans(b_ym), b_sm, input_precision=PRECISION)
    return b_s, b_sm


@triton.jit
def _forward_step(b_s, b_sm, n_left, scale, b_top, b_sum, b_top_m, b_sum_m, b_mixed, MASKED: tl.constexpr):
    """Fold the logits of one tile of n_left keys into the running statistics."""
    b_seen, b_seen_m = b_s, b_sm
    if MASKED:
        m_key = (tl.arange(0, b_s.shape[1]) < n_left)[None, :]
        b_seen, b_seen_m = tl.where(m_key, b_s, float("-inf")), tl.where(m_key, b_sm, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_seen, 1) * scale)
    b_new_m = tl.maximum(b_top_m, tl.max(b_seen_m, 1) * scale)
    b_p = tl.math.exp2(b_seen * scale - b_new[:, None])
    b_pm = tl.math.exp2(b_seen_m * scale - b_new_m[:, None])
    b_sum = b_sum * tl.math.exp2(b_top - b_new) + tl.sum(b_p, 1)
    b_shrink = tl.math.exp2(b_top_m - b_new_m)
    b_sum_m = b_sum_m * b_shrink + tl.sum(b_pm, 1)
    b_mixed = b_mixed * b_shrink + tl.sum(b_pm * b_s, 1)
    return b_new, b_sum, b_new_m, b_sum_m, b_mixed


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(p_q, p_qm, p_batch, p_queue, p_scale, p_parts, n_rows, n_batch, n_queue, n_share, i_first,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One share's statistics, parts [shares, 5, n_rows].

    They are maximum and Σ exp of s, the same of s_m, and Σ exp(s_m) · q·k. Maxima are base 2 and include the
    temperature; q·k in the last sum does not.
    """
    i_m = tl.program_id(0).to(tl.int64)
    n_here = (n_rows - i_m * BLOCK_M).to(tl.int32)
    p_q += i_m * BLOCK_M * D
    p_qm += i_m * BLOCK_M * D
    if CHUNK == BLOCK_D:
        b_q = load_rows(p_q, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
        b_qm = load_rows(p_qm, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
    scale = tl.load(p_scale)
    # Lower than any logit, yet finite: a tile without any key gives exp(−∞), not exp(−∞ + ∞).
    b_top, b_top_m = tl.full([BLOCK_M], -1e30, tl.float32), tl.full([BLOCK_M], -1e30, tl.float32)
    b_sum, b_sum_m, b_mixed = (tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32),
                               tl.zeros([BLOCK_M], tl.float32))
    first, last = _share(n_batch // BLOCK_N + n_queue // BLOCK_N, n_share, 2, MASKED)
    for i_tile in range(first, last):
        p_k, n_left = _keys_tile(p_batch, p_queue, n_batch, n_queue, i_tile, D, BLOCK_N, MASKED)
        if CHUNK == BLOCK_D:
            b_k = load_rows(p_k, n_left, 0, D, BLOCK_D, BLOCK_N, BLOCK_D, MASKED)
            b_s, b_sm = tl.dot(b_q, tl.trans(b_k)), tl.dot(b_qm, tl.trans(b_k))
        else:
            b_s, b_sm = _logits(p_q, p_qm, n_here, p_k, p_k, n_left, D, BLOCK_D, CHUNK, BLOCK_M, BLOCK_N,
                                MASKED, PRECISION)
        b_top, b_sum, b_top_m, b_sum_m, b_mixed = _forward_step(b_s, b_sm, n_left, scale, b_top, b_sum,
                                                                b_top_m, b_sum_m, b_mixed, MASKED)
    o_m = tl.arange(0, BLOCK_M)
    p_out = p_parts + (i_first + tl.program_id(1)).to(tl.int64) * 5 * n_rows + i_m * BLOCK_M + o_m
    m_m = o_m < n_here
    tl.store(p_out, b_top, mask=m_m)
    tl.store(p_out + n_rows, b_sum, mask=m_m)
    tl.store(p_out + 2 * n_rows, b_top_m, mask=m_m)
    tl.store(p_out + 3 * n_rows, b_sum_m, mask=m_m)
    tl.store(p_out + 4 * n_rows, b_mixed, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def _queries_kernel(p_q, p_qm, p_batch, p_queue, p_scale, p_less, p_parts, n_rows, n_batch, n_queue, n_share,
                    i_first, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                    MASKED: tl.constexpr):
    """One share's part of τ / g · dq, without the positives and times 2^SHIFT: parts [shares, n_rows, D].

    dq += (w · softmax(s) − α · softmax(s_m)) k
    """
    i_m = tl.program_id(0).to(tl.int64)
    n_here = (n_rows - i_m * BLOCK_M).to(tl.int32)
    p_q += i_m * BLOCK_M * D
    p_qm += i_m * BLOCK_M * D
    if CHUNK == BLOCK_D:
        b_q = load_rows(p_q, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
        b_qm = load_rows(p_qm, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
    b_less = _load_values(p_less + i_m * BLOCK_M, n_here, BLOCK_M, True)
    b_less_m = _load_values(p_less + n_rows + i_m * BLOCK_M, n_here, BLOCK_M, True)
    scale = tl.load(p_scale)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, last = _share(n_batch // BLOCK_N + n_queue // BLOCK_N, n_share, 2, MASKED)
    for i_tile in range(first, last):
        p_k, n_left = _keys_tile(  # pyright: ignore[reportGeneralTypeIssues]
            p_batch, p_queue, n_batch, n_queue, i_tile, D, BLOCK_N, MASKED)
        b_k = load_rows(p_k, n_left, 0, D, BLOCK_D, BLOCK_N, BLOCK_D, MASKED)
        if CHUNK == BLOCK_D:
            b_s, b_sm = tl.dot(b_q, tl.trans(b_k)), tl.dot(b_qm, tl.trans(b_k))
        else:
            b_s, b_sm = _logits(p_q, p_qm, n_here, p_k, p_k, n_left, D, BLOCK_D, CHUNK, BLOCK_M, BLOCK_N,
                                MASKED, PRECISION)
        b_ds = tl.math.exp2(b_s * scale - b_less[:, None]) - tl.math.exp2(b_sm * scale - b_less_m[:, None])
        if MASKED:
            b_ds = tl.where((tl.arange(0, BLOCK_N) < n_left)[None, :], b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    p_part = p_parts + ((i_first + tl.program_id(1)).to(tl.int64) * n_rows + i_m * BLOCK_M) * D
    _store_rows(p_part, b_dq, n_here, D, BLOCK_D, BLOCK_M)


@triton.jit(do_not_specialize=SIZES)
def _keys_kernel(p_q, p_qm, p_batch, p_scale, p_less, p_grad, p_parts, n_rows, n_batch, n_share, i_first,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One share of the rows' part of τ / max |g| · dk, as `_queries_kernel`: parts [shares, n_batch, D].

    dk += (w · softmax(s) − α · softmax(s_m))ᵀ g q with |g| ≤ 1, and 0 in rows beyond the last
    """
    i_m = tl.program_id(0).to(tl.int64)
    n_here = (n_batch - i_m * BLOCK_M).to(tl.int32)
    p_batch += i_m * BLOCK_M * D
    if CHUNK == BLOCK_D:
        b_k = load_rows(p_batch, n_here, 0, D, BLOCK_D, BLOCK_M, BLOCK_D, True)
    scale = tl.load(p_scale)
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, last = _share(n_rows // BLOCK_N, n_share, 1, MASKED)
    for i_tile in range(first, last):
        o_first = tl.cast(i_tile, tl.int64) * BLOCK_N
        if MASKED:
            o_first += n_rows // BLOCK_N * BLOCK_N
        n_left = n_rows - o_first
        p_tile, p_tile_m = p_q + o_first * D, p_qm + o_first * D
        b_q = load_rows(p_tile, n_left, 0, D, BLOCK_D, BLOCK_N, BLOCK_D, MASKED)
        if CHUNK == BLOCK_D:
            b_qm = load_rows(p_tile_m, n_left, 0, D, BLOCK_D, BLOCK_N, BLOCK_D, MASKED)
            b_s, b_sm = tl.dot(b_k, tl.trans(b_q)), tl.dot(b_k, tl.trans(b_qm))
        else:
            b_s, b_sm = _logits(p_batch, p_batch, n_here, p_tile, p_tile_m, n_left, D, BLOCK_D, CHUNK,
                                BLOCK_M, BLOCK_N, MASKED, PRECISION)
        b_less = _load_values(p_less + o_first, n_left, BLOCK_N, MASKED)
        b_less_m = _load_values(p_less + n_rows + o_first, n_left, BLOCK_N, MASKED)
        b_grad = _load_values(p_grad + o_first, n_left, BLOCK_N, MASKED)
        b_ds = tl.math.exp2(b_s * scale - b_less[None, :]) - tl.math.exp2(b_sm * scale - b_less_m[None, :])
        b_dk = tl.dot((b_ds * b_grad[None, :]).to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_part = p_parts + ((i_first + tl.program_id(1)).to(tl.int64) * n_batch + i_m * BLOCK_M) * D
    _store_rows(p_part, b_dk, n_here, D, BLOCK_D, BLOCK_M)


def _meta(launch_name: str, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Constexprs and launch options of a big kernel."""
    block = padded_width(width)
    bits = "float32" if dtype == torch.float32 else "16 bit"
    chosen = config("contrastive", f"{launch_name}, width {max(block, 64)}, {bits}", generation(device))
    chunk = min(chosen.pop("CHUNK", block), block)
    return {"D": width, "BLOCK_D": block, "CHUNK": chunk, "PRECISION": "tf32x3", **chosen}


def _scale(temperature: Tensor) -> Tensor:
    return LOG2E / temperature.float().reshape(1)


def _stream(kernel: Any, arguments: dict[str, Any], rows: int, streamed: tuple[int, ...],
            part: tuple[int, ...], meta: dict[str, Any], waves: int) -> Tensor:
    """Launch a big kernel: `rows` in blocks, `streamed` in shares of full tiles, their tails as an extra share.

    Returns what the shares wrote, [shares, *part].
    """
    device, size = arguments["p_q"].device, meta["BLOCK_N"]
    blocks, tiles = cdiv(rows, meta["BLOCK_M"]), sum(n // size for n in streamed)
    shares = shares_of(blocks, tiles, device, waves)
    tails = any(n % size for n in streamed)
    parts = torch.empty(shares + tails, *part, dtype=torch.float32, device=device)
    if shares:
        launch(kernel, (blocks, shares), **arguments, p_parts=parts, n_share=cdiv(tiles, shares), i_first=0,
               MASKED=False, **meta)
    if tails:
        launch(kernel, (blocks, 1), **arguments, p_parts=parts, n_share=0, i_first=shares, MASKED=True,
               **meta)
    return parts


def forward(q: Tensor, q_m: Tensor, batch: Tensor, queue: Tensor, temperature: Tensor, alpha: float,
            ids: Tensor | None, item_ids: Tensor | None, first_own: int) -> tuple[Tensor, Tensor]:
    """Return losses float32 [rows] and statistics float32 [3, rows]: lse, lse_m, number of positives.

    Arguments must be contiguous and checked. `item_ids`: ids of all keys, the batch's and then the queue's.
    With `ids` None, row i's positive is key i + `first_own`.
    """
    (rows, width), device = q.shape, q.device
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=device)
    scale, meta = _scale(temperature), _meta("forward", width, q.dtype, device)
    arguments = {"p_q": q, "p_qm": q_m, "p_batch": batch, "p_queue": queue, "p_scale": scale, "n_rows": rows,
                 "n_batch": len(batch), "n_queue": len(queue)}
    parts = _stream(_forward_kernel, arguments, rows, (len(batch), len(queue)), (5, rows), meta, waves=4)
    positives = positive_items(ids, item_ids, (batch, queue), first_own)
    merge_forward(parts, q, positives, scale, alpha, loss, stats)
    return loss, stats


def backward(grad: Tensor, stats: Tensor, q: Tensor, q_m: Tensor, batch: Tensor, queue: Tensor,
             temperature: Tensor, alpha: float, ids: Tensor | None, item_ids: Tensor | None, first_own: int,
             need_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, temperature [1] and the batch's keys ([0, width] without `need_keys`)."""
    lse, lse_m, count = stats
    grad, shift = grad.float().contiguous(), 2.0**-SHIFT
    weight = torch.where(count > 0, 1.0, alpha)
    # softmax · weight · 2^SHIFT = exp2(s · scale − less): everything but the logit in one number per row
    less = torch.stack([lse * LOG2E - weight.log2(),
                        lse_m * LOG2E - (math.log2(alpha) if alpha > 0 else -math.inf)]) - SHIFT
    positive = grad * (1.0 - alpha) / count.clamp(min=1)
    scale = _scale(temperature)
    arguments = {"p_q": q, "p_qm": q_m, "p_batch": batch, "p_scale": scale, "p_less": less, "n_rows": len(q),
                 "n_batch": len(batch)}
    d_q, dots = torch.empty_like(q), torch.empty_like(grad)
    meta = _meta("gradient of queries", q.shape[1], q.dtype, q.device)
    parts = _stream(_queries_kernel, {**arguments, "p_queue": queue, "n_queue": len(queue)}, len(q),
                    (len(batch), len(queue)), tuple(q.shape), meta, waves=1)
    positives = positive_items(ids, item_ids, (batch, queue), first_own)
    merge_gradient(parts, grad * shift, positive, positives, scale, d_q, q, dots)
    d_temperature = -dots.sum().reshape(1) / temperature.float().reshape(1)
    if not need_keys:
        return d_q, d_temperature, batch[:0].clone()
    largest = grad.abs().amax().clamp(min=1e-30) if len(grad) else grad.new_ones(())
    d_keys = torch.empty_like(batch)
    meta = _meta("gradient of keys", q.shape[1], q.dtype, q.device)
    parts = _stream(_keys_kernel, {**arguments, "p_grad": grad / largest}, len(batch), (len(q),),
                    tuple(batch.shape), meta, waves=1)
    positives = positive_items(None if item_ids is None else item_ids[: len(batch)], ids, (q, q[:0]),
                               -first_own)
    merge_gradient(parts, largest * shift, positive, positives, scale, d_keys)
    return d_q, d_temperature, d_keys


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, call) of launches to compile, on `meta` tensors: 4,096 rows, 57,600 queued keys."""
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for width in (64, 128, 256):
        for kind, rows, queued in (("pair", 4096, 57600), ("id", 4095, 57599)):  # the latter with tails
            q, q_m, batch, queue = (empty(n, width) for n in (rows, rows, rows, queued))
            temperature, grad, stats = (empty(*shape, dtype=torch.float32)
                                        for shape in ((1,), (rows,), (3, rows)))
            ids, item_ids = ((empty(rows, dtype=torch.int64), empty(rows + queued, dtype=torch.int64))
                             if kind == "id" else (None, None))
            inputs = (q, q_m, batch, queue, temperature, 0.4, ids, item_ids, 0)
            yield f"forward, width {width}, positives by {kind}", partial(forward, *inputs)
            yield f"backward, width {width}, positives by {kind}", partial(backward, grad, stats, *inputs,
                                                                           True)
