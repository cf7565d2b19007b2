"""What texts read of images, and answers of questions: states, and keys and values of all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageStates:
    """What generated texts look at: visual tokens of images, or states of encoded questions, packed."""

    rows: Tensor  # [rows, vision width]
    offsets: Tensor  # int32 [images + 1]

    def split(self) -> list[ImageStates]:
        """Each image by itself, a view."""
        lengths = self.offsets.diff().tolist()
        return [ImageStates(rows, self.offsets.new_tensor([0, len(rows)]))
                for rows in self.rows.split(lengths)]


def image_states(image_embeds: Tensor) -> ImageStates:
    """[images, tokens, vision width], packed."""
    images, tokens = image_embeds.shape[:2]
    offsets = torch.arange(images + 1, dtype=torch.int32, device=image_embeds.device) * tokens
    return ImageStates(image_embeds.flatten(0, 1), offsets)


@dataclass(frozen=True)
class ImageKV:
    """Cross-attention keys and values of every layer for a batch of images.

    `kv` is one tensor [image rows, layers, 2, heads, head_dim] per eye (two for NLVR2), `offsets` int32
    [images + 1].
    """

    kv: tuple[Tensor, ...]
    offsets: Tensor
    _layers: list[list[tuple[Tensor, ...]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Cut once for all layers: the backward then joins their gradients in one pass. A cut per layer would
        # fill and add a tensor as large as all layers' each time.
        cuts = [kv.flatten(1, 2).unbind(1) for kv in self.kv]
        object.__setattr__(self, "_layers", [list(zip(cut[::2], cut[1::2], strict=True)) for cut in cuts])

    def layer(self, index: int) -> list[tuple[Tensor, ...]]:
        """(k, v) [image rows, heads, head_dim] of one layer, per eye."""
        return [layers[index] for layers in self._layers]

    def split(self) -> list[ImageKV]:
        """Each image by itself, a view."""
        lengths = self.offsets.diff().tolist()
        return [ImageKV(tuple(parts), self.offsets.new_tensor([0, length]))
                for length, *parts in zip(lengths, *(kv.split(lengths) for kv in self.kv), strict=True)]
