"""Textbook BLIP: padded batches, attention by explicit softmax, nothing shared, fused or skipped.

Li et al., "BLIP: Bootstrapping Language-Image Pre-training", ICML 2022. Parameter names are those of the published
checkpoints, so that their `state_dict` loads with `strict=True`. No dropout and no stochastic depth: outputs and
gradients are functions of weights and inputs alone. Shapes: B images or texts, T visual tokens, L text length,
S length of what is attended to, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of BLIP base; the width of the vision feed-forward is 4 x vision_width."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vocabulary: int = 30_524
    positions: int = 512
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_feed_forward: int = 3072
    projection: int = 256


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D / heads) + mask) v for each head.

    query [B, L, D], key and value [B, S, D], additive mask broadcast to [B, heads, L, S]; returns [B, L, D].
    """

    def split(x: Tensor) -> Tensor:  # [B, L, D] → [B, heads, L, D / heads]
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    q, k, v = split(query), split(key), split(value)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------- vision


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.qkv(x).chunk(3, dim=-1), self.heads))


class VisionMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = VisionMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, 3, H, W] → [B, T - 1, D]


class VisionTransformer(nn.Module):
    """ViT with a [CLS] token, learned absolute positions and a final norm: images [B, 3, H, H] → [B, T, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_width
        tokens = (sizes.image_size // sizes.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.patch_embed = PatchEmbedding(sizes.patch_size, width)
        self.blocks = nn.ModuleList(VisionBlock(width, sizes.vision_heads) for _ in range(sizes.vision_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def resize_positions(pos_embed: Tensor, tokens: int) -> Tensor:
    """Bicubic resize of [1, T, D] position embeddings to `tokens`; [CLS]'s own position is kept."""
    cls_position, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old, new = int(grid.shape[1] ** 0.5), int((tokens - 1) ** 0.5)
    grid = grid.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_position, grid.flatten(2).transpose(1, 2)], dim=1)


# ------------------------------------------------------------------------------------------------------ text


class TextEmbeddings(nn.Module):
    """Words + positions, then LayerNorm; no token types."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocabulary, sizes.text_width)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.text_width)
        self.LayerNorm = nn.LayerNorm(sizes.text_width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(sizes.positions)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : input_ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))


class TextAttentionHeads(nn.Module):
    """Query from the text; key and value from the text itself or from what it looks at (`key_width` wide)."""

    def __init__(self, width: int, key_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        return attention(self.query(x), self.key(states), self.value(states), self.heads, mask)


class ResidualOutput(nn.Module):
    """LayerNorm(dense(x) + residual), the post-norm end of attention and of the feed-forward."""

    def __init__(self, inner_width: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class TextAttention(nn.Module):
    def __init__(self, width: int, key_width: int, heads: int) -> None:
        super().__init__()
        self.self = TextAttentionHeads(width, key_width, heads)
        self.output = ResidualOutput(width, width)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, states, mask), x)


class TwinOutput(nn.Module):
    """NLVR2: the mean of the two outputs, or from layer 6 on a linear layer on both; one LayerNorm."""

    def __init__(self, width: int, merge: bool) -> None:
        super().__init__()
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x0: Tensor, x1: Tensor, residual: Tensor) -> Tensor:
        x0, x1 = self.dense0(x0), self.dense1(x1)
        x = (x0 + x1) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([x0, x1], dim=-1))
        return self.LayerNorm(x + residual)


class TwinCrossAttention(nn.Module):
    """NLVR2: the text looks at two images, each through projections of its own."""

    def __init__(self, width: int, key_width: int, heads: int, merge: bool) -> None:
        super().__init__()
        self.self0 = TextAttentionHeads(width, key_width, heads)
        self.self1 = TextAttentionHeads(width, key_width, heads)
        self.output = TwinOutput(width, merge)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor], mask: None = None) -> Tensor:
        return self.output(self.self0(x, states[0], mask), self.self1(x, states[1], mask), x)


class TextLayer(nn.Module):
    """Self-attention → cross-attention (if there is something to look at) → feed-forward, all post-norm."""

    def __init__(self, sizes: Sizes, cross_attention: nn.Module) -> None:
        super().__init__()
        width = sizes.text_width
        self.attention = TextAttention(width, width, sizes.text_heads)
        self.crossattention = cross_attention
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, sizes.text_feed_forward)})
        self.output = ResidualOutput(sizes.text_feed_forward, width)

    def forward(self, x: Tensor, mask: Tensor, states: Tensor | None, states_mask: Tensor | None) -> Tensor:
        x = self.attention(x, x, mask)
        if states is not None:
            x = self.crossattention(x, states, states_mask)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextStack(nn.Module):
    """The three modes of BLIP's text transformer.

    Unimodal encoder: no `states`. Image-grounded encoder: `states`. Image-grounded decoder: `states` and `causal`.
    Masks are additive, -10,000 in self-attention and -1e9 in cross-attention, as in the published code.
    """

    def __init__(self, sizes: Sizes, states_width: int, twin: bool = False) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(sizes)
        shape = (sizes.text_width, states_width, sizes.text_heads)
        layers = [
            TextLayer(sizes, TwinCrossAttention(*shape, merge=i >= 6) if twin else TextAttention(*shape))
            for i in range(sizes.text_layers)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L], 1 = token, 0 = padding
        states: Tensor | tuple[Tensor, Tensor] | None = None,  # [B, S, states_width], a pair of them if twin
        states_mask: Tensor | None = None,  # [B, S], 1 = visible; all visible if None
        causal: bool = False,
    ) -> Tensor:  # [B, L, D]
        visible = attention_mask[:, None, None, :].float()  # [B, 1, 1, L]
        if causal:
            length = input_ids.shape[1]
            visible = visible * torch.ones(length, length).tril()  # [B, 1, L, L]
        mask = (1 - visible) * -10_000.0
        if states_mask is not None:
            states_mask = (1 - states_mask[:, None, None, :].float()) * -1e9
        x = self.embeddings(input_ids)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, states, states_mask)
        return x


class PredictionTransform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """LM head: dense → GELU → LayerNorm → projection tied to the word embeddings, plus a bias (stored twice)."""

    def __init__(self, width: int, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(word_embeddings.num_embeddings))
        self.transform = PredictionTransform(width)
        self.decoder = nn.Linear(width, word_embeddings.num_embeddings)
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class TextDecoder(nn.Module):
    """Causal text stack with the LM head: returns logits [B, L, V].

    With `tied_to`, every text parameter but self-attention (its output dense and LayerNorm included) is the encoder's.
    """

    def __init__(self, sizes: Sizes, states_width: int, tied_to: TextStack | None = None) -> None:
        super().__init__()
        self.bert = TextStack(sizes, states_width)
        if tied_to is not None:
            self.bert.embeddings = tied_to.embeddings
            for mine, encoders in zip(self.bert.encoder["layer"], tied_to.encoder["layer"], strict=True):
                mine.crossattention = encoders.crossattention
                mine.intermediate = encoders.intermediate
                mine.output = encoders.output
        words = self.bert.embeddings.word_embeddings
        self.cls = nn.ModuleDict({"predictions": Predictions(sizes.text_width, words)})

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, states: Tensor, states_mask: Tensor | None = None
    ) -> Tensor:
        return self.cls["predictions"](self.bert(input_ids, attention_mask, states, states_mask, causal=True))
