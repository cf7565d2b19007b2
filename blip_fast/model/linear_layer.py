"""The linear layer of every part of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from blip_kernels import linear
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` by `blip_kernels.linear`."""

    def forward(self, input: Tensor, made_by: tuple[Callable[[Tensor], Tensor], Tensor] | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, made_by=made_by)


def behind(cheap: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    """layer(cheap(x)) of a linear layer, adapters around it or not; `cheap` is a norm or GELU.

    The backward keeps x alone and computes cheap(x) again: for a vision block that is two fifths less to keep.
    """
    return layer(cheap(x), made_by=(cheap, x)) if torch.is_grad_enabled() else layer(cheap(x))
