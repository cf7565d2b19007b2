"""Linear layers with 8-bit weights and activations, for CPUs with 8-bit products (VNNI, AMX) and inference.

    w ≈ wₛ[out] · w₈,   x ≈ xₛ · (x₈ − 128),   out = xₛ wₛ Σ (x₈ − 128) w₈ + bias,   or its GELU

Activations are unsigned: without AMX, oneDNN multiplies signed ones a thousand times slower. Weights have one
scale per output. Activations are measured in every call, so nothing is calibrated and nothing is clipped. A
whole block of rows (an image, see `row_blocks`) has one scale; otherwise each row has its own. So a row's
result depends only on its block, to the last bit: sums of integers are exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.cpu import processor
from blip_kernels.cpu.packed_linear import check_operands, is_one_input

ZERO = 128  # zero point of unsigned activations
TINY = torch.finfo(torch.float32).tiny  # scale of all zeros


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight [out, in] in 8 bits, as oneDNN reads it."""

    tensor: Tensor  # opaque (layout `torch._mkldnn`)
    scale: Tensor  # float32 [out]
    shape: torch.Size  # [out, in]
    dtype: torch.dtype  # of the activations that it multiplies

    def to_dense(self) -> Tensor:
        """Return the weight that it represents."""
        identity = torch.eye(self.shape[1], dtype=torch.uint8) + ZERO
        return _product(identity, 1.0, self, None, False, torch.float32).t().contiguous().to(self.dtype)


def quantise_weight(weight: Tensor) -> QuantisedWeight:
    """Round weight [out, in] to 8 bits. Raises ValueError if the processor has no 8-bit products."""
    if not processor.has_int8():
        raise ValueError("8-bit products need a processor with VNNI or AMX: pack the weight in another precision")
    dense = weight.detach().float()
    scale = dense.abs().amax(1).clamp(min=TINY) / 127
    rounded = (dense / scale[:, None]).round().to(torch.int8)
    return QuantisedWeight(torch.ops.onednn.qlinear_prepack(rounded, None), scale, weight.shape, weight.dtype)


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *,
                     gelu: bool = False) -> Tensor:
    """x [..., in] → [..., out] in x's dtype, with GELU on request. bias: [out], same dtype.

    Raises ValueError as `packed_linear`.
    """
    check_operands(x, bias, weight.shape, weight.dtype)
    rows, bias = x.reshape(-1, x.shape[-1]), None if bias is None else bias.float()
    if is_one_input(rows):
        low, high = rows.aminmax()
        scale = max(-float(low), float(high), TINY) / 127
        out = _product(_in_8_bits(rows * (1 / scale)), scale, weight, bias, gelu, x.dtype)
    else:
        rows = rows.float()
        scales = rows.abs().amax(1, keepdim=True).clamp_(min=TINY).div_(127)
        out = _product(_in_8_bits(rows / scales), 1.0, weight, None, False, torch.float32)
        out = out.mul_(scales) if bias is None else torch.addcmul(bias, out, scales)
        out = (F.gelu(out) if gelu else out).to(x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def _in_8_bits(numbers: Tensor) -> Tensor:
    """Return round(numbers) + ZERO as uint8, for numbers up to ±127, which it overwrites.

    bfloat16 represents all these integers. The way goes through int8, to which PyTorch converts four times as
    fast as to uint8; flipping its highest bit adds ZERO.
    """
    return numbers.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO)


def _product(rows: Tensor, scale: float, weight: QuantisedWeight, bias: Tensor | None, gelu: bool,
             dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(rows, scale, ZERO, weight.tensor, weight.scale, zeros, bias,
                                              1.0, 0, dtype, "gelu" if gelu else "none", [],
                                              "none" if gelu else "")
