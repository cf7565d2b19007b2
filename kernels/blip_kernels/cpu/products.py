"""Which library multiplies matrices on a CPU. Only this module decides, for training and for inference.

| processor                        | float32             | bfloat16              | 16-bit types without products |
|----------------------------------|---------------------|-----------------------|-------------------------------|
| Intel from AVX2 on, AMD's AVX2   | MKL                 | oneDNN                | float32's, rounded once       |
| AMD with AVX-512, and below AVX2 | oneDNN              | oneDNN                | float32's, rounded once       |
| PyTorch without MKL              | oneDNN, or PyTorch  | oneDNN, where allowed | float32's, rounded once       |

MKL uses its AVX-512 kernels only on Intel's processors. On AMD's with AVX-512 it reaches half of oneDNN's
speed. Without AVX-512 MKL is faster than oneDNN. Below AVX2 the results of its rows depend on their number.
Measurements: docs/decisions/cpu.md, "Products by what the processor is good at".

Without 16-bit products, 16-bit values are multiplied as float32 and the result is rounded once, which gives
what hardware with 16-bit products computes. PyTorch's own 16-bit kernels without such hardware are up to 20
times slower than float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.cpu import processor

# Fewest rows for which packing a weight for one product pays (768 × 3072 in bfloat16: 0.35 ms)
PACKED_FROM = 1024


def prefers_mkl() -> bool:
    """Whether MKL multiplies float32: if it is faster than oneDNN, and a row's bits do not depend on others."""
    return torch.backends.mkl.is_available() and processor.has_avx2() and (
        processor.is_intel() or not processor.has_avx512())


def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this dtype in hardware."""
    if dtype == torch.bfloat16:
        return processor.has_bfloat16()
    return dtype != torch.float16 or processor.has_float16()


def is_slow(x: Tensor) -> bool:
    """Whether products of this tensor are faster in float32: 16 bits on a CPU that does not multiply them."""
    return x.device.type == "cpu" and not has_products(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of one dtype, computed in float32 if 16 bits are slow here."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None, rows_alike: bool = False) -> Tensor:
    """x [rows, in] weight [out, in]ᵀ + bias [out] on a CPU, all of one dtype, of any strides.

    With `rows_alike` a float32 row has the same bits for any number of rows that is a multiple of four.
    oneDNN computes it then: MKL guarantees this only for packed weights.
    """
    if is_slow(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if not _by_onednn(x, rows_alike):
        return F.linear(x, weight, bias)
    if len(x) >= PACKED_FROM and weight.is_contiguous():
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, rows_alike: bool) -> bool:
    if x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.float32:
        return rows_alike or not prefers_mkl()
    return x.dtype == torch.bfloat16 and x.is_contiguous()  # dyᵀ x takes a slow path in oneDNN
