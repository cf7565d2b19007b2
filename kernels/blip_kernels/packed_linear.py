"""Linear layers on a CPU whose weight was brought into the order in which oneDNN's products read it. Inference alone.

    out = x weightᵀ + bias,  or its GELU (the exact one, by erf) before it is rounded

A plain `F.linear` in bfloat16 reorders the weight in every call, which for the few rows of a decoding step takes as
long as the product, and copies the bias into the output first; in float32 it goes to MKL, which on some processors
reaches half of oneDNN's speed. Packed once, both are saved.

A row's result is the same to the last bit whatever the number of rows: one row alone would go another way through
oneDNN, so it is computed beside a copy of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKED_DTYPES = (torch.float32, torch.bfloat16)


def packing_cannot(weight: Tensor) -> str | None:
    """Why a weight cannot be packed here; None where it can."""
    if weight.device.type != "cpu":
        return f"it is for a CPU, and the weight is on {weight.device}"
    if weight.dtype not in PACKED_DTYPES:
        return f"it takes float32 and bfloat16, not {weight.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 products (AVX-512)"
    return None


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight into the order of oneDNN's products.

    Args:
        weight: [out, in], float32 or bfloat16, on a CPU.

    Returns:
        An opaque tensor (layout `torch._mkldnn`) of the same shape and dtype; `to_dense()` gives the weight back.

    Raises:
        ValueError: it is no matrix, or cannot be packed here; the message says why.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [out, in], got shape {tuple(weight.shape)}")
    if reason := packing_cannot(weight):
        raise ValueError(f"a weight cannot be packed: {reason}")
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x [..., in] → [..., out] in x's dtype.

    Args:
        x: float32 or bfloat16 as the weight.
        packed: [out, in], from `pack_weight`.
        bias: [out], same dtype.
        gelu: apply GELU to the result, at no cost.

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument requires grad while gradients are recorded: use
            `F.linear`, or `torch.no_grad()`.
    """
    if packed.layout != torch._mkldnn:  # type: ignore[attr-defined]
        raise ValueError("packed must come from pack_weight, got a plain tensor: use F.linear")
    if x.shape[-1:] != packed.shape[1:] or x.dtype != packed.dtype:
        raise ValueError(f"x must be {packed.dtype} [..., {packed.shape[1]}] as the weight, got {x.dtype} "
                         f"{tuple(x.shape)}")
    if bias is not None and (bias.shape != packed.shape[:1] or bias.dtype != packed.dtype):
        raise ValueError(f"bias must be {packed.dtype} [{packed.shape[0]}] as the weight, got {bias.dtype} "
                         f"{tuple(bias.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("x or bias requires grad, but a packed layer has no gradient: call it under torch.no_grad(), "
                         "or take F.linear")
    rows = x.reshape(-1, x.shape[-1])
    alone = len(rows) == 1
    out = torch.ops.mkldnn._linear_pointwise(rows.expand(2, -1) if alone else rows, packed, bias,
                                             "gelu" if gelu else "none", [], "none" if gelu else "")
    return (out[:1] if alone else out).view(*x.shape[:-1], packed.shape[0])
