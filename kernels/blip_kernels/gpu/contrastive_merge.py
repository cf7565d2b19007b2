"""Triton kernels that merge what the shares of `contrastive`'s big kernels wrote, and add the positives.

Shares are added in order, so that results repeat bit for bit. A row's positives are a sum over its positive
keys: by pair its own key, by id all keys of its id. Ids are sorted once, so that each row's keys are one
range of the sorted order and the big loops compare no ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.constants import NO_ID
from blip_kernels.gpu.configs import config
from blip_kernels.gpu.kernel_launch import generation, launch
from blip_kernels.gpu.streaming import KERNEL_LN2, cdiv, padded_width

# One compiled kernel for all their values.
SIZES = ["n_rows", "n_batch", "n_first", "n_items", "n_shares", "shift"]


@triton.jit
def _positives(p_ranges, p_order, p_first, p_second, p_weights, o_row, m_row, n_rows, n_first, n_items, shift,
               BY_ID: tl.constexpr, WEIGHTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ of each row's positive items (weighted), float32 [rows, BLOCK_D], and their number.

    Items are the rows of `first` [n_first, D], then those of `second`. By pair, row i's item is i + shift; by
    id, its items are order[ranges[0, i] : ranges[1, i]].
    """
    o_d = tl.arange(0, BLOCK_D)
    if BY_ID:
        b_next = tl.load(p_ranges + o_row, mask=m_row, other=0)
        b_end = tl.load(p_ranges + n_rows + o_row, mask=m_row, other=0)
    else:
        b_next = o_row + shift
        b_end = tl.where(m_row & (b_next >= 0) & (b_next < n_items), b_next + 1, b_next)
    b_count = b_end - b_next
    b_total = tl.zeros([o_row.shape[0], BLOCK_D], tl.float32)
    for _ in range(tl.max(b_count, 0).to(tl.int32)):
        m_item = b_next < b_end
        b_item = b_next
        if BY_ID:
            b_item = tl.load(p_order + b_next, mask=m_item, other=0)
        p_item = tl.where(b_item < n_first, p_first + b_item * D, p_second + (b_item - n_first) * D)
        b_x = tl.load(p_item[:, None] + o_d[None, :], mask=m_item[:, None] & (o_d < D)[None, :], other=0.0)
        b_x = b_x.to(tl.float32)
        if WEIGHTED:
            b_x *= tl.load(p_weights + b_item, mask=m_item, other=0.0)[:, None]
        b_total += b_x
        b_next += 1
    return b_total, b_count


@triton.jit(do_not_specialize=SIZES)
def _merge_forward_kernel(p_parts, p_q, p_batch, p_queue, p_scale, p_ranges, p_order, p_loss, p_stats, alpha,
                          n_rows, n_batch, n_items, n_shares, shift, BY_ID: tl.constexpr, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Merge shares and positives into losses and statistics [3, n_rows]: lse, lse_m, number of positives."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    b_top, b_top_m = tl.full([ROWS], -1e30, tl.float32), tl.full([ROWS], -1e30, tl.float32)
    b_sum, b_sum_m, b_mixed = tl.zeros([ROWS],
                                       tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for i_share in range(n_shares):
        p_part = p_parts + tl.cast(i_share, tl.int64) * 5 * n_rows + o_row
        b_part, b_part_m = tl.load(p_part, mask=m_row,
                                   other=0.0), tl.load(p_part + 2 * n_rows, mask=m_row, other=0.0)
        b_new, b_new_m = tl.maximum(b_top, b_part), tl.maximum(b_top_m, b_part_m)
        b_old, b_add = tl.math.exp2(b_top - b_new), tl.math.exp2(b_part - b_new)
        b_old_m, b_add_m = tl.math.exp2(b_top_m - b_new_m), tl.math.exp2(b_part_m - b_new_m)
        b_sum = b_sum * b_old + b_add * tl.load(p_part + n_rows, mask=m_row, other=1.0)
        b_sum_m = b_sum_m * b_old_m + b_add_m * tl.load(p_part + 3 * n_rows, mask=m_row, other=1.0)
        b_mixed = b_mixed * b_old_m + b_add_m * tl.load(p_part + 4 * n_rows, mask=m_row, other=0.0)
        b_top, b_top_m = b_new, b_new_m
    b_total, b_count = _positives(p_ranges, p_order, p_batch, p_queue, p_parts, o_row, m_row, n_rows, n_batch,
                                  n_items, shift, BY_ID, False, D, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_row[:, None] * D + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :],
                  other=0.0)
    b_positive = tl.sum(b_q.to(tl.float32) * b_total, 1) / tl.maximum(b_count, 1).to(tl.float32)
    b_lse = (b_top + tl.math.log2(b_sum)) * KERNEL_LN2
    b_lse_m = (b_top_m + tl.math.log2(b_sum_m)) * KERNEL_LN2
    b_weight = tl.where(b_count > 0, 1.0, alpha)
    b_target = alpha * b_mixed / b_sum_m + (1.0 - alpha) * b_positive
    b_loss = b_weight * b_lse - b_target * (tl.load(p_scale) * KERNEL_LN2)
    tl.store(p_loss + o_row, b_loss, mask=m_row)
    tl.store(p_stats + o_row, b_lse, mask=m_row)
    tl.store(p_stats + n_rows + o_row, b_lse_m, mask=m_row)
    tl.store(p_stats + 2 * n_rows + o_row, b_count.to(tl.float32), mask=m_row)


@triton.jit(do_not_specialize=SIZES)
def _merge_gradient_kernel(p_parts, p_outer, p_weights, p_q, p_first, p_second, p_ranges, p_order, p_scale,
                           p_out, p_dots, n_rows, n_first, n_items, n_shares, shift, OF_KEYS: tl.constexpr,
                           BY_ID: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Merge shares and positives into a gradient [n_rows, D]; for queries also q · dq, for τ's gradient."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < n_rows
    m_all = m_row[:, None] & (o_d < D)[None, :]
    b_total, _ = _positives(  # pyright: ignore[reportGeneralTypeIssues]
        p_ranges, p_order, p_first, p_second, p_weights, o_row, m_row, n_rows, n_first, n_items, shift, BY_ID,
        OF_KEYS, D, BLOCK_D)
    if OF_KEYS:
        b_outer = tl.load(p_outer + 0 * o_row)
    else:
        b_outer = tl.load(p_outer + o_row, mask=m_row, other=0.0)
        b_total *= tl.load(p_weights + o_row, mask=m_row, other=0.0)[:, None]
    b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_share in range(n_shares):
        p_part = p_parts + (tl.cast(i_share, tl.int64) * n_rows + o_row)[:, None] * D + o_d[None, :]
        b_sum += tl.load(p_part, mask=m_all, other=0.0)
    b_out = (b_sum * b_outer[:, None] - b_total) * (tl.load(p_scale) * KERNEL_LN2)
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_all)
    if not OF_KEYS:
        b_q = tl.load(p_q + o_row[:, None] * D + o_d[None, :], mask=m_all, other=0.0)
        tl.store(p_dots + o_row, tl.sum(b_q.to(tl.float32) * b_out, 1), mask=m_row)


@dataclass(frozen=True)
class PositiveItems:
    """Which items are positive for which row. Items are the rows of `first` [n, width], then of `second`.

    Row i's items are order[ranges[0, i] : ranges[1, i]]; without `ranges`, the item i + `shift` if there is
    one.
    """

    first: Tensor
    second: Tensor
    ranges: Tensor | None
    order: Tensor | None
    shift: int


def positive_items(ids: Tensor | None, item_ids: Tensor | None, items: tuple[Tensor, Tensor],
                   shift: int) -> PositiveItems:
    """Find the positives of rows with `ids` among `items` with `item_ids` (NO_ID equals nothing), or by pair."""
    if ids is None or item_ids is None:
        return PositiveItems(*items, None, None, shift)
    in_order, order = item_ids.sort(stable=True)
    first = torch.searchsorted(in_order, ids)
    last = torch.searchsorted(in_order, ids, right=True)
    return PositiveItems(*items, torch.stack([first, torch.where(ids == NO_ID, first, last)]), order, 0)


def merge_forward(parts: Tensor, q: Tensor, positives: PositiveItems, scale: Tensor, alpha: float,
                  loss: Tensor, stats: Tensor) -> None:
    """Merge `parts` [shares, 5, rows] of `_forward_kernel` into `loss` [rows] and `stats` [3, rows]."""
    (rows, width), chosen = q.shape, config("contrastive", "merge", generation(q.device))
    first, second = positives.first, positives.second
    launch(_merge_forward_kernel, (cdiv(rows, chosen["ROWS"]),), p_parts=parts, p_q=q, p_batch=first,
           p_queue=second, p_scale=scale, p_ranges=positives.ranges, p_order=positives.order, p_loss=loss,
           p_stats=stats, alpha=alpha, n_rows=rows, n_batch=len(first), n_items=len(first) + len(second),
           n_shares=len(parts), shift=positives.shift, BY_ID=positives.ranges is not None, D=width,
           BLOCK_D=padded_width(width), **chosen)


def merge_gradient(parts: Tensor, outer: Tensor, weights: Tensor, positives: PositiveItems, scale: Tensor,
                   out: Tensor, q: Tensor | None = None, dots: Tensor | None = None) -> None:
    """Write (`outer` · Σ `parts` [shares, rows, width] − the weighted positives) / τ to `out` [rows, width].

    With `q` and `dots`, out is q's gradient: `outer` and `weights` are per row, and q · out goes to `dots`.
    Without them it is the keys' gradient: `outer` is one factor, `weights` are per item.
    """
    shares, rows, width = parts.shape
    chosen, first, second = config("contrastive", "merge",
                                   generation(parts.device)), positives.first, positives.second
    launch(_merge_gradient_kernel, (cdiv(rows, chosen["ROWS"]),), p_parts=parts, p_outer=outer,
           p_weights=weights, p_q=q, p_first=first, p_second=second, p_ranges=positives.ranges,
           p_order=positives.order, p_scale=scale, p_out=out, p_dots=dots, n_rows=rows, n_first=len(first),
           n_items=len(first) + len(second), n_shares=shares, shift=positives.shift, OF_KEYS=q is None,
           BY_ID=positives.ranges is not None, D=width, BLOCK_D=padded_width(width), **chosen)
