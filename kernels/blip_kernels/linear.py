"""A linear layer that saves as little as possible for its backward.

    y = x wᵀ + b,    dx = dy w,    dw = dyᵀ x,    db = Σ dy

`blip_kernels.cpu.products` says which library multiplies on a CPU.

It saves x and the weight itself, where `F.linear` under autocast saves a cast copy of the weight. If x =
cheap(source) by a norm or GELU, it saves the source instead of x: the backward of the cheap operation keeps
the source anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.cpu.products import linear_product


@torch.library.custom_op("blip_kernels::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] weight [out, in]ᵀ + bias [out], all of one dtype, of any strides."""
    return F.linear(x, weight, bias)


@_product.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_product(x, weight, bias)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


class _Linear(torch.autograd.Function):
    """x [rows, in] in the products' dtype, weight and bias in any."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None,  # type: ignore[override]
                source: Tensor | None, cheap: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.save_for_backward(x if source is None else source, weight)
        ctx.cheap, ctx.bias_dtype = cheap, None if bias is None else bias.dtype
        return _product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _product(grad, weight.to(grad.dtype).t(), None)
        if ctx.needs_input_grad[1]:
            if ctx.cheap is not None:
                x = ctx.cheap(x).reshape(-1, weight.shape[1]).to(grad.dtype)
            dw = _product(grad.t(), x.t(), None).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum(0, dtype=ctx.bias_dtype)
        return dx, dw, db, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
           made_by: tuple[Callable[[Tensor], Tensor], Tensor] | None = None) -> Tensor:
    """`F.linear`, with first-order gradients.

    While `torch.compile` traces, it is plain operations: the compiler decides what to save and how to
    compute.

    Args:
        x: [..., in].
        weight: [out, in], in x's dtype or, under autocast, in any.
        bias: [out], as the weight.
        made_by: (cheap, source) if x = cheap(source) without random draws: source is saved and x recomputed.

    Returns:
        [..., out] in x's dtype, under autocast in autocast's dtype.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype
        if weight.dtype != dtype:
            raise ValueError(f"weight is {weight.dtype}, x {dtype}: cast one of them, or use autocast")
    cheap, source = made_by or (None, None)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    if rows.device.type == "cpu" and torch.is_inference_mode_enabled():
        out = linear_product(rows, weight.to(dtype), None if bias is None else bias.to(dtype),
                             rows_alike=True)
    else:
        out = _Linear.apply(rows, weight, bias, source, cheap)
    return out.view(*x.shape[:-1], len(weight))
