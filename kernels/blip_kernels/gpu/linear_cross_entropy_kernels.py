"""Triton kernels of the LM head fused with its loss. What they compute: `blip_kernels.linear_cross_entropy`.

Forward, two kernels. A program of the first takes a block of rows and `TILES` tiles of the vocabulary. After
each tile's product (a loop over the width) it folds the tile into four numbers per row: maximum, Σ exp, Σ
logits and the target's logit. The second merges them over the splits: only 4 × splits floats per row are ever
stored. Blocks of rows are neighbours in the grid, so that all of them find a split's weights in the L2:
weight is read once.

Backward, per chunk of the vocabulary (32 MiB of d logits, so that they stay in the L2): d logits from the
same tiles, then `_product_kernel` twice, d weight = d logitsᵀ · hidden and d hidden += d logits · weight.
Each element of d weight is written once; d hidden's sum over chunks is float32. d logits are padded with
zeros to whole tiles, and row indices past the end of hidden or weight are clamped to the last row, so that no
product masks inside its loop. The tail of the vocabulary is masked after its product, once per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.gpu.configs import config
from blip_kernels.gpu.kernel_launch import generation, launch
from blip_kernels.gpu.streaming import KERNEL_LN2, KERNEL_LOG2E, cdiv, precision

CHUNK_BYTES = 32 << 20  # of d logits of one chunk of the vocabulary


@triton.jit
def _logits_tile(p_hidden, p_weight, p_bias, rows, vocabulary, width, s_hidden, s_weight, o_row, o_column,
                 PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """float32 [BLOCK_M, BLOCK_N] logits; rows and columns past the end repeat the last one."""
    o_row = tl.minimum(o_row, rows - 1).to(tl.int64)
    o_column = tl.minimum(o_column, vocabulary - 1)
    o_k = tl.arange(0, BLOCK_K)
    p_b_hidden = p_hidden + o_row[:, None] * s_hidden + o_k[None, :]
    p_b_weight = p_weight + o_column.to(tl.int64)[None, :] * s_weight + o_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    whole = width // BLOCK_K * BLOCK_K
    for _ in range(0, whole, BLOCK_K):
        acc = tl.dot(tl.load(p_b_hidden), tl.load(p_b_weight), acc, input_precision=PRECISION)
        p_b_hidden += BLOCK_K
        p_b_weight += BLOCK_K
    if whole < width:
        m_k = whole + o_k < width
        b_hidden = tl.load(p_b_hidden, mask=m_k[None, :], other=0.0)
        b_weight = tl.load(p_b_weight, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_hidden, b_weight, acc, input_precision=PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + o_column).to(tl.float32)[None, :]
    return acc


@triton.jit
def _forward_kernel(p_hidden, p_weight, p_bias, p_targets, p_parts, rows, vocabulary, width, s_hidden,
                    s_weight, splits, TILES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Parts [4, splits, rows] of a block of rows in one split: maximum, Σ exp(x − maximum), Σ x, target's x."""
    i_row, i_split = tl.program_id(0), tl.program_id(1)
    o_row = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    b_target = tl.load(p_targets + o_row, mask=m_row, other=-1)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_exp, b_sum, b_at = (tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32),
                          tl.zeros([BLOCK_M], tl.float32))
    first = i_split * (TILES * BLOCK_N)
    for column in range(first, tl.minimum(first + TILES * BLOCK_N, vocabulary), BLOCK_N):
        o_column = column + tl.arange(0, BLOCK_N)
        b_x = _logits_tile(p_hidden, p_weight, p_bias, rows, vocabulary, width, s_hidden, s_weight, o_row,
                           o_column, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        m_column = (o_column < vocabulary)[None, :]
        b_sum += tl.sum(tl.where(m_column, b_x, 0.0), 1)
        b_at += tl.sum(tl.where(o_column[None, :] == b_target[:, None], b_x, 0.0), 1)
        b_x = tl.where(m_column, b_x, float("-inf")) * KERNEL_LOG2E
        new_max = tl.maximum(b_max, tl.max(b_x, 1))
        b_exp = b_exp * tl.exp2(b_max - new_max) + tl.sum(tl.exp2(b_x - new_max[:, None]), 1)
        b_max = new_max
    p_part = p_parts + i_split.to(tl.int64) * rows + o_row
    s_part = splits.to(tl.int64) * rows
    tl.store(p_part, b_max, mask=m_row)
    tl.store(p_part + s_part, b_exp, mask=m_row)
    tl.store(p_part + 2 * s_part, b_sum, mask=m_row)
    tl.store(p_part + 3 * s_part, b_at, mask=m_row)


@triton.jit
def _merge_kernel(p_parts, p_targets, p_losses, p_lse, rows, vocabulary, splits, ignore_index, smoothing,
                  smoothing_each, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merge the parts of all splits into losses and log-sum-exp of a block of rows."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    o_split = tl.arange(0, BLOCK_S)
    s_part = splits.to(tl.int64) * rows
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_exp, b_sum, b_at = (tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32),
                          tl.zeros([BLOCK_M], tl.float32))
    for start in range(0, splits, BLOCK_S):
        m_part = (start + o_split < splits)[:, None] & m_row[None, :]
        p_part = p_parts + (start + o_split).to(tl.int64)[:, None] * rows + o_row[None, :]
        b_part_max = tl.load(p_part, mask=m_part, other=float("-inf"))
        b_part_exp = tl.load(p_part + s_part, mask=m_part, other=0.0)
        b_sum += tl.sum(tl.load(p_part + 2 * s_part, mask=m_part, other=0.0), 0)
        b_at += tl.sum(tl.load(p_part + 3 * s_part, mask=m_part, other=0.0), 0)
        new_max = tl.maximum(b_max, tl.max(b_part_max, 0))
        new_max = tl.where(m_row, new_max, 0.0)
        b_exp = b_exp * tl.exp2(b_max - new_max) + tl.sum(b_part_exp * tl.exp2(b_part_max - new_max[None, :]),
                                                          0)
        b_max = new_max
    b_lse = (b_max + tl.log2(tl.where(m_row, b_exp, 1.0))) * KERNEL_LN2
    b_loss = b_lse - (1.0 - smoothing) * b_at - tl.where(smoothing > 0, smoothing_each * b_sum, 0.0)
    b_target = tl.load(p_targets + o_row, mask=m_row, other=0)
    b_loss = tl.where((b_target >= 0) & (b_target < vocabulary), b_loss, float("nan"))
    tl.store(p_losses + o_row, tl.where(b_target == ignore_index, 0.0, b_loss), mask=m_row)
    tl.store(p_lse + o_row, b_lse, mask=m_row)


@triton.jit
def _d_logits_kernel(p_hidden, p_weight, p_bias, p_targets, p_lse, p_per_row, p_d_logits, p_d_bias, rows,
                     vocabulary, width, first, s_hidden, s_weight, s_d_logits, smoothing, smoothing_each,
                     PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr):
    """A tile of d logits, columns counted from `first`, zeros past the ends; one part of d bias per block."""
    i_row, i_column = tl.program_id(0), tl.program_id(1)
    o_row = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o_here = i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    o_column = first + o_here
    b_x = _logits_tile(p_hidden, p_weight, p_bias, rows, vocabulary, width, s_hidden, s_weight, o_row,
                       o_column, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    o_real = tl.minimum(o_row, rows - 1)
    b_lse, b_target = tl.load(p_lse + o_real), tl.load(p_targets + o_real)
    b_per_row = tl.load(p_per_row + o_row, mask=o_row < rows, other=0.0)
    b_d = tl.exp2((b_x - b_lse[:, None]) * KERNEL_LOG2E) - smoothing_each
    b_d = tl.where(o_column[None, :] == b_target[:, None], b_d - (1.0 - smoothing), b_d) * b_per_row[:, None]
    m_column = o_column < vocabulary
    b_d = tl.where(m_column[None, :], b_d, 0.0)
    p_tile = p_d_logits + o_row.to(tl.int64)[:, None] * s_d_logits + o_here[None, :]
    tl.store(p_tile, b_d.to(p_d_logits.dtype.element_ty))
    if p_d_bias is not None:
        tl.store(p_d_bias + i_row.to(tl.int64) * vocabulary + o_column, tl.sum(b_d, 0), mask=m_column)


@triton.jit
def _product_kernel(p_a, p_b, p_total, p_out, p_unit, m, n, k, s_am, s_ak, s_b, s_total, s_out,
                    ADD: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [m, n] = unit · a [m, k] b [k, n] (+ total with ADD). a has whole tiles, with zeros past k."""
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < n)[None, :]
    p_b_a = p_a + o_m.to(tl.int64)[:, None] * s_am + o_k.to(tl.int64)[None, :] * s_ak
    p_b_b = p_b + o_k.to(tl.int64)[:, None] * s_b + o_n[None, :]
    s_step_a, s_step_b = tl.cast(s_ak, tl.int64) * BLOCK_K, tl.cast(s_b, tl.int64) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    whole = k // BLOCK_K * BLOCK_K
    for _ in range(0, whole, BLOCK_K):
        b_b = tl.load(p_b_b) if EVEN_N else tl.load(p_b_b, mask=m_n, other=0.0)
        acc = tl.dot(tl.load(p_b_a), b_b, acc, input_precision=PRECISION)
        p_b_a += s_step_a
        p_b_b += s_step_b
    if whole < k:
        b_b = tl.load(p_b_b, mask=(whole + o_k < k)[:, None] & m_n, other=0.0)
        acc = tl.dot(tl.load(p_b_a), b_b, acc, input_precision=PRECISION)
    acc *= tl.load(p_unit)
    m_out = (o_m < m)[:, None] & m_n
    o_m = o_m.to(tl.int64)
    if ADD:
        acc += tl.load(p_total + o_m[:, None] * s_total + o_n[None, :], mask=m_out, other=0.0)
    tl.store(p_out + o_m[:, None] * s_out + o_n[None, :], acc.to(p_out.dtype.element_ty), mask=m_out)


# -------------------------------------------------------------------------------------------------- launchers


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
            ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return losses and log-sum-exp, float32 [rows].

    Arguments as `blip_kernels.linear_cross_entropy`; products in `dtype`.
    """
    hidden, weight, targets = _in_rows(hidden, dtype), _in_rows(weight, dtype), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, width), vocabulary = hidden.shape, len(weight)
    losses, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    chosen = _config("forward", hidden)
    splits = cdiv(vocabulary, chosen["TILES"] * chosen["BLOCK_N"])
    parts = torch.empty((4, splits, rows), dtype=torch.float32, device=hidden.device)
    launch(_forward_kernel, (cdiv(rows, chosen["BLOCK_M"]), splits), p_hidden=hidden, p_weight=weight,
           p_bias=bias, p_targets=targets, p_parts=parts, rows=rows, vocabulary=vocabulary, width=width,
           s_hidden=hidden.stride(0), s_weight=weight.stride(0), splits=splits, PRECISION=precision(dtype),
           **chosen)
    chosen = _config("merge", hidden)
    launch(_merge_kernel, (cdiv(rows, chosen["BLOCK_M"]),), p_parts=parts, p_targets=targets, p_losses=losses,
           p_lse=lse, rows=rows, vocabulary=vocabulary, splits=splits, ignore_index=ignore_index,
           smoothing=smoothing, smoothing_each=smoothing / vocabulary, **chosen)
    return losses, lse


def backward(per_row: Tensor, unit: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
             targets: Tensor, lse: Tensor, smoothing: float, dtype: torch.dtype,
             needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias in their own dtypes, without rows if not in `needs`.

    The gradient of each row's loss is `per_row` times `unit` (a scalar), see
    `blip_kernels.linear_cross_entropy.upstream`.
    """
    low_hidden, low_weight, targets = _in_rows(hidden, dtype), _in_rows(weight, dtype), targets.contiguous()
    (rows, width), vocabulary, device = hidden.shape, len(weight), hidden.device
    per_row, unit = per_row.float().contiguous(), unit.float()
    bias_in = None if bias is None else bias.contiguous()
    d_hidden = torch.empty((rows if needs[0] else 0, width), dtype=hidden.dtype, device=device)
    d_weight = torch.empty((vocabulary if needs[1] else 0, width), dtype=weight.dtype, device=device)
    tiles, by_weight, by_hidden = (_config(name, low_hidden) for name in ("d logits", "d weight", "d hidden"))
    padded = _up(rows, max(tiles["BLOCK_M"], by_weight["BLOCK_K"], by_hidden["BLOCK_M"]))
    whole = max(tiles["BLOCK_N"], by_weight["BLOCK_M"], by_hidden["BLOCK_K"])
    columns = _chunk_columns(padded, vocabulary, whole, dtype)
    d_logits = torch.empty((padded, columns), dtype=dtype, device=device)
    blocks = padded // tiles["BLOCK_M"]
    d_bias = torch.empty((blocks, vocabulary), dtype=torch.float32, device=device) if needs[2] else None
    in_parts = needs[0] and columns < vocabulary
    total = torch.empty((rows, width), dtype=torch.float32, device=device) if in_parts else None
    for first in range(0, vocabulary if rows else 0, columns):
        here = min(columns, vocabulary - first)
        launch(_d_logits_kernel, (blocks, _up(here, whole) // tiles["BLOCK_N"]), p_hidden=low_hidden,
               p_weight=low_weight, p_bias=bias_in, p_targets=targets, p_lse=lse, p_per_row=per_row,
               p_d_logits=d_logits, p_d_bias=d_bias, rows=rows, vocabulary=vocabulary, width=width,
               first=first, s_hidden=low_hidden.stride(0), s_weight=low_weight.stride(0), s_d_logits=columns,
               smoothing=smoothing, smoothing_each=smoothing / vocabulary, PRECISION=precision(dtype),
               **tiles)
        if needs[1]:
            _product(d_logits.T, low_hidden, None, d_weight[first : first + here], unit, rows, by_weight)
        if needs[0]:
            out = d_hidden if total is None or first + here == vocabulary else total
            _product(d_logits, low_weight[first : first + here], total if first else None, out, unit, here,
                     by_hidden)
    if not rows:
        d_weight.zero_()
    d_bias_sum = hidden.new_empty(0) if d_bias is None else d_bias.sum(0) * unit
    return d_hidden, d_weight, d_bias_sum.to(hidden.dtype if bias is None else bias.dtype)


def _product(a: Tensor, b: Tensor, total: Tensor | None, out: Tensor, unit: Tensor, k: int,
             chosen: dict[str, int]) -> None:
    """Compute out = unit · a b (+ total) over the first k columns of a."""
    m, n = out.shape
    grid = cdiv(n, chosen["BLOCK_N"]), cdiv(m, chosen["BLOCK_M"])
    launch(_product_kernel, grid, p_a=a, p_b=b, p_total=total, p_out=out, p_unit=unit, m=m, n=n, k=k,
           s_am=a.stride(0), s_ak=a.stride(1), s_b=b.stride(0),
           s_total=0 if total is None else total.stride(0), s_out=out.stride(0), ADD=total is not None,
           EVEN_N=n % chosen["BLOCK_N"] == 0, PRECISION=precision(b.dtype), **chosen)


def _chunk_columns(rows: int, vocabulary: int, whole: int, dtype: torch.dtype) -> int:
    """Return the columns of a chunk of d logits: as many whole tiles as `CHUNK_BYTES` hold, at least one."""
    fit = CHUNK_BYTES // (max(rows, 1) * dtype.itemsize) // whole * whole
    return min(max(fit, whole), _up(vocabulary, whole))


def _up(size: int, step: int) -> int:
    return cdiv(size, step) * step


def _in_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [rows, width] in `dtype` with contiguous rows; a copy only if needed."""
    x = x.to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()


def _config(name: str, x: Tensor) -> dict[str, int]:
    width = "float32" if x.dtype == torch.float32 else "16 bit"
    return config("linear_cross_entropy", f"{name}, {width}", generation(x.device))


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for `blip_kernels.compiled.aot`: captions of a batch; BERT's vocabulary, two tokens of BLIP."""
    rows, width, vocabulary = 2048, 768, 30524
    hidden, weight = (torch.empty((n, width), dtype=dtype, device="meta") for n in (rows, vocabulary))
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    lse, unit = torch.empty(rows, device="meta"), torch.empty((), device="meta")
    for name, bias in (("", torch.empty(vocabulary, dtype=dtype, device="meta")), (" without bias", None)):
        yield f"forward{name}", partial(forward, hidden, weight, bias, targets, 0.1, -100, dtype)
        needs = [True, True, bias is not None]
        yield f"backward{name}", partial(backward, lse, unit, hidden, weight, bias, targets, lse, 0.1, dtype,
                                         needs)
