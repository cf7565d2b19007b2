"""The linear layer of every part of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from blip_kernels import linear
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` by `blip_kernels.linear`."""

    def forward(self, input: Tensor,
                made_by: tuple[Callable[[Tensor], Tensor], Tensor] | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, made_by=made_by)


def layer_after(cheap: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    """layer(cheap(x)), where `layer` is a linear layer, with adapters around it or without, and `cheap` a
    norm or GELU.

    Only x is kept for the backward, which computes cheap(x) again: a vision block keeps two fifths less.
    """
    return layer(cheap(x), made_by=(cheap, x)) if torch.is_grad_enabled() else layer(cheap(x))


def product_of_few(layer: nn.Module, x: Tensor, few: Tensor, cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """A linear layer whose first `cut` outputs are needed for a few rows of x [rows, inputs] alone (int64
    [few]) → x of these rows, their first outputs, and the other outputs of all rows.

    A plain `Linear` computes no more than that. A layer that is packed, quantised or has an adapter around it
    computes with more than its weight, so it gives all outputs of all rows.
    """
    x_few = x.index_select(0, few)
    if isinstance(layer, Linear):
        weight, bias = layer.weight, layer.bias
        others = linear(x, weight[cut:], bias[cut:])
        return x_few, linear(x_few, weight[:cut], bias[:cut]), others
    outputs = layer(x)
    return x_few, outputs[:, :cut].index_select(0, few), outputs[:, cut:]
