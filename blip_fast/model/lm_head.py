"""The language model's head: from decoder states to logits over the vocabulary."""

from __future__ import annotations

import torch
from blip_kernels import linear
from torch import Tensor, nn

from blip_fast.model.config import TextConfig
from blip_fast.model.linear_layer import Linear


class VocabularyProduct(nn.Module):
    """The operands of logits (see `LMHead.forward`) → logits [..., vocab_size], in float32 or wider: 16 bits
    cannot tell the best tokens from the next best (docs/decisions/precision.md). It has no parameters."""

    def forward(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        return linear(states.to(wide), weight.to(wide), bias.to(wide))


class LMHead(nn.Module):
    """dense → GELU → norm, then a projection with the word embeddings (`tied`) or a weight of its own, and a
    bias."""

    def __init__(self, config: TextConfig, tied: bool) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.projection = None if tied else Linear(config.width, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.product: nn.Module = VocabularyProduct()

    def forward(self, hidden: Tensor, word_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., width], the stack's word embeddings [vocab_size, width] → what `F.linear` makes logits of:
        states [..., width], weight [vocab_size, width], bias [vocab_size]."""
        return self.norm(self.activation(self.dense(hidden))), self.weight(word_embeds), self.bias

    def logits(self, hidden: Tensor, word_embeds: Tensor) -> Tensor:
        """As `forward`, multiplied: logits [..., vocab_size]."""
        return self.product(*self(hidden, word_embeds))

    def weight(self, word_embeds: Tensor) -> Tensor:
        """The projection's weight [vocab_size, width]."""
        return word_embeds if self.projection is None else self.projection.weight
