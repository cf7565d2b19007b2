"""Momentum encoders: an exponential moving average of the model, used for
contrastive keys and soft targets."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts


class MomentumEncoders(nn.Module):
    """EMA copy of the vision transformer, the unimodal text encoder and both
    projections (MoCo, BLIP section 3.2).

    Only what the features need is copied: no cross-attention, no decoder. The copy
    starts with the model's weights.
    """

    def __init__(self, model: BlipModel) -> None:
        super().__init__()
        text = dataclasses.replace(model.config.text, cross_attention=False)
        self.copy = BlipModel(dataclasses.replace(model.config, text=text, text_stacks="encoder",
                                                  matching=False, reasoning=False))
        self.copy.requires_grad_(False)
        self._stack = "text.tied." if model.config.text_stacks == "tied" else "text.encoder."
        self.copy_from(model)

    @torch.no_grad()
    def copy_from(self, model: BlipModel) -> None:
        averages, sources = self._followed_tensors(model)
        torch._foreach_copy_(averages, sources)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def update(self, model: BlipModel, momentum: float) -> None:
        """average ← momentum · average + (1 − momentum) · weight. Each rank updates what it
        holds: under ZeRO 3 its shard."""
        averages, sources = self._followed_tensors(model)
        torch._foreach_lerp_(averages, sources, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        for average in self.copy.parameters():
            _drop_gathered(average)

    @torch.no_grad()
    def features(self, pixels: Tensor, texts: PackedTexts) -> tuple[Tensor, Tensor]:
        """Unit image and text features [batch, embed_dim]. The last vision block computes only [CLS]."""
        image_embeds = self.copy.vision(pixels, cls_only=True)
        return self.copy.image_features(image_embeds), self.copy.text_features(texts)

    def followed(self, name: str) -> str:
        """The model's name of the parameter or module that the copy calls `name`."""
        return name.replace("text.encoder.", self._stack, 1)

    def _followed_tensors(self, model: BlipModel) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's tensors of the copy, and those of the model's parameters that they follow."""
        source = dict(model.named_parameters())
        pairs = [(average, source[self.followed(name)]) for name, average in self.copy.named_parameters()]
        return ([_local_tensor(average) for average, _ in pairs],
                [_local_tensor(weight) for _, weight in pairs])


def _local_tensor(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter: all of it, or its shard under ZeRO 3. Copy and original have the same
    shape, so they are sharded alike."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _drop_gathered(parameter: nn.Parameter) -> None:
    """Under ZeRO 3 small parameters stay gathered. After the shards have changed,
    drop what was gathered before."""
    if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
        parameter.partition()  # type: ignore[attr-defined]
