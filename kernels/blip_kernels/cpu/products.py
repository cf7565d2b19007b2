"""Which library multiplies matrices on a CPU: the one place that decides, for training and for inference.

| processor                        | float32             | bfloat16              | 16-bit types without products |
|----------------------------------|---------------------|-----------------------|-------------------------------|
| Intel from AVX2 on, AMD's AVX2   | MKL                 | oneDNN                | float32's, rounded once       |
| AMD with AVX-512, and below AVX2 | oneDNN              | oneDNN                | float32's, rounded once       |
| PyTorch without MKL              | oneDNN, or PyTorch  | oneDNN, where allowed | float32's, rounded once       |

MKL takes its AVX-512 kernels on Intel's processors alone. On AMD's with AVX-512 it reaches half of oneDNN's speed.
Where neither has AVX-512, MKL is ahead. Below AVX2 its rows depend on their number.
Measurements: docs/decisions.md, "Products by what the processor is good at".

A 16-bit product of float32 operands that hold 16-bit values, rounded once at its end, is what hardware with 16-bit
products computes. PyTorch's own kernels without such hardware are up to 20 times slower than float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.cpu import processor

PACKED_FROM = 1024  # rows from which packing a weight for one product pays (768 × 3072 in bfloat16: 0.35 ms)


def prefers_mkl() -> bool:
    """Whether MKL multiplies float32 here: where it is faster than oneDNN and holds what is promised about rows."""
    return torch.backends.mkl.is_available() and processor.has_avx2() and (
        processor.is_intel() or not processor.has_avx512())


def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this dtype in hardware."""
    if dtype == torch.bfloat16:
        return processor.has_bfloat16()
    return dtype != torch.float16 or processor.has_float16()


def is_slow(x: Tensor) -> bool:
    """Whether products of this tensor run faster in float32: 16 bits on a CPU without products of them."""
    return x.device.type == "cpu" and not has_products(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of one dtype, float32 inside where 16 bits are slow here."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None, rows_alike: bool = False) -> Tensor:
    """x [rows, in] weight [out, in]ᵀ + bias [out] on a CPU, all of one dtype, of any strides.

    With `rows_alike` a row of float32 has the same bits whatever the number of rows, as long as that is a multiple of
    four: oneDNN computes it, for MKL holds that of packed weights alone.
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
    return x.dtype == torch.bfloat16 and x.is_contiguous()  # dyᵀ x goes another, slow way through oneDNN
