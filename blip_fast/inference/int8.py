"""Linear layers in 8 bits. Processors with products of 8 bits compute images in them. Elsewhere weights alone are held
so, through torchao, for their memory (docs/decisions.md)."""

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
    """Whether the layers of a model compute in 8 bits there."""
    return device.type == "cpu" and processor.has_int8()


def require_torchao(device: torch.device) -> None:
    """Raises ValueError where torchao is needed on a device and is not installed."""
    if not multiplies_int8(device) and find_spec("torchao") is None:
        raise ValueError("dtype int8 needs torchao, which is not installed: pip install 'blip-fast[int8]'")


def dense(tensor: Tensor) -> Tensor:
    """A tensor of a model's `state_dict`: where torchao holds it in 8 bits, what it stands for."""
    return tensor if type(tensor) is Tensor else tensor.dequantize()


def quantise_linear_layers(model: BlipModel) -> None:
    """In place: on a CPU that multiplies 8 bits, compute the vision encoder's blocks in them. Elsewhere hold the
    weights of all blocks so, with a scale for each output, and compute in the model's dtype."""
    if multiplies_int8(model.vision.cls_token.device):
        pack_linear_layers(model, int8=True)
        return
    require_torchao(model.vision.cls_token.device)
    for name in ("torchao", "torch.utils._pytree"):  # of libraries for GPUs that are not here, and of its own enums
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    for part in (model.vision.blocks, *(stack.get_submodule("layers") for stack in model.text.values())):
        for module in list(part.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, Linear):
                    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                    plain.weight, plain.bias = layer.weight, layer.bias
                    quantize_(plain, Int8WeightOnlyConfig(version=2))  # such a weight multiplies in F.linear alone
                    setattr(module, name, plain)
