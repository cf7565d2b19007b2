"""Linear layers in 8 bits. A CPU that multiplies 8-bit integers computes images in them. Elsewhere torchao
holds only the weights in 8 bits, to save memory (docs/decisions/precision.md)."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from blip_kernels.cpu import processor
from torch import Tensor, nn

from blip_fast.inference.cpu_packing import pack_linear_layers
from blip_fast.model.blip import BlipModel
from blip_fast.model.linear_layer import Linear


def multiplies_int8(device: torch.device) -> bool:
    """Whether the layers of a model compute in 8 bits on this device."""
    return device.type == "cpu" and processor.has_int8()


def require_torchao(device: torch.device) -> None:
    """Raises ValueError where torchao is needed on a device and is not installed."""
    if not multiplies_int8(device) and find_spec("torchao") is None:
        raise ValueError("dtype int8 needs torchao, which is not installed: pip install 'blip-fast[int8]'")


def dense(tensor: Tensor) -> Tensor:
    """A tensor of a model's `state_dict`, dequantised if torchao holds it in 8 bits."""
    return tensor if type(tensor) is Tensor else tensor.dequantize()


def quantise_linear_layers(model: BlipModel) -> None:
    """Change a model in place. On a CPU that multiplies 8-bit integers, the vision encoder's blocks then
    compute in them. Elsewhere the weights of all blocks are held in 8 bits, with a scale for each output, and
    products are in the model's dtype."""
    if multiplies_int8(model.vision.cls_token.device):
        pack_linear_layers(model, int8=True)
        return
    require_torchao(model.vision.cls_token.device)
    # warnings about GPU libraries that are not here, and about its own enums
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    for part in (model.vision.blocks, *(stack.get_submodule("layers") for stack in model.text.values())):
        for module in list(part.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, Linear):
                    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None,
                                      device="meta")
                    plain.weight, plain.bias = layer.weight, layer.bias
                    # such a weight multiplies only in F.linear
                    quantize_(plain, Int8WeightOnlyConfig(version=2))
                    setattr(module, name, plain)
