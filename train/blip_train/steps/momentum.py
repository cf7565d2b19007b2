"""Momentum encoders: an exponential moving average of the model, read for contrastive keys and soft targets."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts


class MomentumEncoders(nn.Module):
    """EMA copy of the vision transformer, the unimodal text encoder and both projections (MoCo, BLIP section 3.2).

    Only what the features need is copied: no cross-attention, no decoder. It starts as the model's own weights.
    """

    def __init__(self, model: BlipModel) -> None:
        super().__init__()
        text = dataclasses.replace(model.config.text, cross_attention=False)
        self.copy = BlipModel(dataclasses.replace(model.config, text=text, text_stacks="encoder", matching=False,
                                                  reasoning=False))
        self.copy.requires_grad_(False)
        self._stack = "text.tied." if model.config.text_stacks == "tied" else "text.encoder."
        self.copy_from(model)

    @torch.no_grad()
    def copy_from(self, model: BlipModel) -> None:
        averages, sources = self._held(model)
        torch._foreach_copy_(averages, sources)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def update(self, model: BlipModel, momentum: float) -> None:
        """average ← momentum · average + (1 − momentum) · weight, on what each rank holds: under ZeRO 3 its shard."""
        averages, sources = self._held(model)
        torch._foreach_lerp_(averages, sources, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        for average in self.copy.parameters():
            _forget_gathered(average)

    @torch.no_grad()
    def features(self, pixels: Tensor, texts: PackedTexts) -> tuple[Tensor, Tensor]:
        """Unit image and text features [batch, embed_dim]; of the last vision block only [CLS] is computed."""
        image_embeds = self.copy.vision(pixels, cls_only=True)
        return self.copy.image_features(image_embeds), self.copy.text_features(texts)

    def followed(self, name: str) -> str:
        """What the model calls the parameter or module that the copy calls `name`."""
        return name.replace("text.encoder.", self._stack, 1)

    def _held(self, model: BlipModel) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's tensors of the copies, and of the model's parameters that they follow."""
        source = dict(model.named_parameters())
        pairs = [(average, source[self.followed(name)]) for name, average in self.copy.named_parameters()]
        return [_held(average) for average, _ in pairs], [_held(weight) for _, weight in pairs]


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or under ZeRO 3 its shard. Copy and original, of one shape, are
    sharded alike."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _forget_gathered(parameter: nn.Parameter) -> None:
    """Under ZeRO 3 small parameters stay gathered: what was gathered before the shards changed must go."""
    if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
        parameter.partition()  # type: ignore[attr-defined]
