"""The list of tiles of packed segments, made on the GPU.

The host knows the number of rows but not the lengths of segments, and reading them would make it wait for the
GPU. The list has room for the largest possible number of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip_kernels.gpu.kernel_launch import launch


@triton.jit
def _schedule_kernel(p_tiles, p_offsets, n_segments, max_tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the tiles of segment i, (segment, first row within it), after those of all earlier segments.

    Entries after the last tile are −1.
    """
    i_segment = tl.program_id(0)
    first = 0
    for start in range(0, i_segment, BLOCK):
        o_segment = start + tl.arange(0, BLOCK)
        m_before = o_segment < i_segment
        b_length = (tl.load(p_offsets + o_segment + 1, mask=m_before, other=0)
                    - tl.load(p_offsets + o_segment, mask=m_before, other=0))
        first += tl.sum((b_length + ROWS - 1) // ROWS)
    length = tl.load(p_offsets + i_segment + 1) - tl.load(p_offsets + i_segment)
    end = first + (length + ROWS - 1) // ROWS
    for start in range(first, end, BLOCK):
        o_tile = start + tl.arange(0, BLOCK)
        m_tile = o_tile < end
        tl.store(p_tiles + 2 * o_tile, i_segment + tl.zeros_like(o_tile), mask=m_tile)
        tl.store(p_tiles + 2 * o_tile + 1, (o_tile - first) * ROWS, mask=m_tile)
    if i_segment == n_segments - 1:
        for start in range(end, max_tiles, BLOCK):
            o_tile = start + tl.arange(0, BLOCK)
            tl.store(p_tiles + 2 * o_tile, tl.full([BLOCK], -1, tl.int32), mask=o_tile < max_tiles)


@triton.jit
def rows_of_tile(p_tiles, p_q_offsets, p_kv_offsets, i_tile, i_segment):
    """Look up a tile of the list.

    Returns its first row within the segment; the segment's first query, number of queries, first key and
    number of keys.
    """
    row = tl.load(p_tiles + 2 * i_tile + 1)
    q_first, kv_first = tl.load(p_q_offsets + i_segment), tl.load(p_kv_offsets + i_segment)
    n_q = tl.load(p_q_offsets + i_segment + 1) - q_first
    n_kv = tl.load(p_kv_offsets + i_segment + 1) - kv_first
    return row, q_first, n_q, kv_first, n_kv


def tiles_of(offsets: Tensor, rows: int, tile_rows: int) -> Tensor:
    """List all tiles of `tile_rows` rows: int32 [tiles, 2], segment and first row of each.

    The list is as long as the most tiles that `rows` rows in these segments can make; unused entries are −1.
    """
    segments = len(offsets) - 1
    most = rows // tile_rows + segments
    tiles = torch.empty((most, 2), dtype=torch.int32, device=offsets.device)
    launch(_schedule_kernel, (segments,), p_tiles=tiles, p_offsets=offsets, n_segments=segments,
           max_tiles=most, ROWS=tile_rows, BLOCK=256, num_warps=4)
    return tiles
