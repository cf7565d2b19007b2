"""What kernels that stream one side of a product past the other share: constants, loads, shares."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from blip_kernels.gpu.kernel_launch import generation

LOG2E = math.log2(math.e)  # factor of logits: exponentials are powers of two
LN2 = math.log(2.0)
# The same inside kernels, which read globals only as constexprs.
KERNEL_LOG2E, KERNEL_LN2 = tl.constexpr(LOG2E), tl.constexpr(LN2)
MULTIPROCESSOR_COUNTS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and B200, if no GPU can be asked


@triton.jit
def load_rows(p_x, n_rows, first, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """[ROWS, COLUMNS] of x [n_rows, D] from column `first` on, zeros past the end; rows end only if MASKED."""
    o_row, o_d = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    p_rows = p_x + o_row * D + o_d
    if MASKED:
        return tl.load(p_rows, mask=(o_row < n_rows) & (o_d < D), other=0.0)
    if BLOCK_D != D:
        return tl.load(p_rows, mask=(o_row >= 0) & (o_d < D), other=0.0)
    return tl.load(p_rows)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded_width(width: int) -> int:
    """Columns of a tile that holds `width` features: a power of two, at least the 16 of a tensor core."""
    return 1 << (max(width, 16) - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of products: TF32 in three passes keeps the accuracy of float32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def shares_of(blocks: int, tiles: int, device: torch.device, waves: int) -> int:
    """Return the number of shares to cut the streamed side into.

    It has `tiles` tiles, and the other side makes `blocks` programs. The result is the number that finishes
    first if every multiprocessor runs one program at a time and a program costs its tiles and four more, with
    at most `waves` programs per multiprocessor. 0 if nothing is streamed.
    """
    if tiles == 0:
        return 0
    units = (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda"
             else MULTIPROCESSOR_COUNTS[generation(device)])
    most = max(1, min(tiles, waves * units // max(blocks, 1)))
    return min(range(1, most + 1), key=lambda n: (cdiv(blocks * n, units) * (cdiv(tiles, n) + 4), n))
