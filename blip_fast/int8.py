"""Weights of linear layers in 8 bits, through torchao: half of bfloat16's memory, not its speed (docs/decisions.md)."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from torch import nn

from blip_fast.linear import Linear
from blip_fast.model import BlipModel


def require_torchao() -> None:
    """Raises ValueError where torchao is not installed."""
    if find_spec("torchao") is None:
        raise ValueError("dtype int8 needs torchao, which is not installed: pip install 'blip-fast[int8]'")


def quantise_linear_layers(model: BlipModel) -> None:
    """Hold the weights of all blocks and of the projection to keys and values in int8, in place, with a scale for each
    output; products stay in the model's dtype. Embeddings and heads are left as they are."""
    require_torchao()
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of libraries for GPUs that are not here
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    for part in (model.vision.blocks, model.text):
        for module in list(part.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, Linear):
                    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                    plain.weight, plain.bias = layer.weight, layer.bias
                    quantize_(plain, Int8WeightOnlyConfig(version=2))  # such a weight multiplies in F.linear alone
                    setattr(module, name, plain)
