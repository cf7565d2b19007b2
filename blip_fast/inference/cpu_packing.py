"""A model prepared for inference on a CPU: its linear layers packed, GELU computed within the product before
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from blip_kernels import (
    PackedWeight,
    pack_weight,
    packed_linear,
    packing_cannot,
    quantise_weight,
    quantised_linear,
)
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_fast.model.linear_layer import Linear
from blip_fast.model.lm_head import LMHead
from blip_fast.model.text import FeedForward
from blip_fast.model.vision import VisionBlock

TEXT_ROWS = 64  # about as many as a step of generation has, or a few texts
BEFORE_GELU: dict[type[nn.Module], str] = {VisionBlock: "mlp_in", FeedForward: "mlp_in", LMHead: "dense"}


class PackedLinear(nn.Module):
    """Replaces a `Linear`, or a convolution over patches that do not overlap and lie in rows. With `gelu` it
    also computes the GELU after it. Its weight is not held twice.

    It stays on the CPU and in its dtype. `state_dict` gives the weight as it was.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rows: int, gelu: bool = False,
                 int8: bool = False) -> None:
        """Pack for about this many rows. Raises ValueError where the weight cannot be packed here."""
        super().__init__()
        weight = layer.weight.flatten(1)
        self._packed = quantise_weight(weight) if int8 else pack_weight(weight, rows)
        self._product: Callable[..., Tensor] = quantised_linear if int8 else packed_linear
        self._shape, self.gelu = layer.weight.shape, gelu
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self._packed, self.bias, gelu=self.gelu)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._packed.to_dense().view(self._shape)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        raise ValueError("a model that was packed for inference on a CPU stays there in its dtype: load it "
                         "anew with another device or dtype")


class PackedVocabularyProduct(nn.Module):
    """Replaces `VocabularyProduct`: as that, with the projection's weight packed in float32."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self._packed = packed

    def forward(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        return packed_linear(states.to(wide), self._packed, bias.to(wide))


def pack_linear_layers(model: BlipModel, int8: bool = False) -> None:
    """Replace the linear layers of a model by their packed form, in place, and pack the vocabulary's
    projection, in float32.

    Outputs stay the same up to rounding. After it, no bit of a row depends on how many rows are computed
    together. The weight of the vocabulary is also kept as it is, because embeddings are looked up in it. The
    packed model has no gradients.

    With `int8` the vision encoder's blocks are computed in 8 bits, except norms and softmax. Texts are not:
    rounded activations there change one caption in seven (docs/decisions/precision.md).

    Where weights cannot be packed (`blip_kernels.packing_cannot`: on a GPU, in float16) the model is left as
    it is.
    """
    if packing_cannot(model.vision.cls_token):
        return
    vision = {*model.vision.blocks.modules()}
    tokens = model.config.vision.tokens
    for module in list(model.modules()):
        before_gelu = BEFORE_GELU.get(type(module))
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear) and not (module is model.lm_head and name == "projection"):
                setattr(module, name, PackedLinear(
                    layer, tokens if module in vision else TEXT_ROWS, name == before_gelu,
                    int8 and module in vision))
        if before_gelu is not None:
            module.activation = nn.Identity()
    model.vision.patch_embed = PackedLinear(model.vision.patch_embed, tokens)  # type: ignore[arg-type]
    if model.lm_head is not None:
        weight = model.lm_head.weight(model.stack("decoder").word_embeds.weight)
        model.lm_head.product = PackedVocabularyProduct(pack_weight(weight.float()))
    model.requires_grad_(False)


def is_packed(model: BlipModel) -> bool:
    """Whether `pack_linear_layers` has packed this model."""
    return isinstance(model.vision.patch_embed, PackedLinear)
