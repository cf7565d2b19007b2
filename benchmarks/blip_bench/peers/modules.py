"""transformers' BLIP cut into three modules that export and compile: the strongest form of its weights there.

Attention is PyTorch's fused one; an image's keys and values are projected once and shared by its beams;
texts keep their keys and values from step to step. transformers' `generate` does the last alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

INPUTS = ("ids", "positions", "mask", "order")  # of a step, as `step_inputs` gives them
MASKED = -3e4  # added to what may not be seen: far below any product, and finite in every dtype

Step = Callable[[Tensor, int, Tensor], Tensor]
"""Tokens int64 [rows, steps], the place of their first, and int64 [rows], the row of the step before that
each goes on with → float32 [rows, vocabulary], the last token's logits. An image's beams are rows in
succession."""


class Peer(NamedTuple):
    """An implementation.

    Attributes:
        encode: pixels float32 [images, 3, size, size] → image embeds [images, tokens, width].
        begin: image embeds → the steps of their captions; None where they were not wanted.
        own_threads: whether both run in threads that are not PyTorch's.
    """

    encode: Callable[[Tensor], Tensor]
    begin: Callable[[Tensor], Step] | None
    own_threads: bool = True


class Vision(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision = model.vision_model

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.class_embedding.expand(pixels.shape[0], 1, -1), patches], 1)
        x = x + embeddings.position_embedding
        for layer in self.vision.encoder.layers:
            attention = layer.self_attn
            qkv = attention.qkv(layer.layer_norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            q, k, v = qkv.unbind(2)
            seen = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + attention.projection(seen.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.vision.post_layernorm(x)


class ImageKV(nn.Module):
    """Image embeds [images, tokens, width] → layers' keys and values [images, heads, tokens, head width]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer)

    def forward(self, embeds: Tensor) -> tuple[Tensor, ...]:
        return tuple(_by_head(part(embeds), layer)
                     for layer in self.layers for part in (layer.key, layer.value))


class Decoder(nn.Module):
    """What `step_inputs` gives, texts' keys and values so far, images' keys and values → logits of the last
    token [rows, vocabulary], texts' keys and values with those of this step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.fixed = False  # whether texts' keys and values have all their places from the start
        bert = model.text_decoder.bert
        self.embeddings, self.layers, self.head = bert.embeddings, bert.encoder.layer, model.text_decoder.cls

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, order: Tensor,
                *kv: Tensor) -> tuple[Tensor, ...]:
        past, image_kv = kv[: len(kv) // 2], kv[len(kv) // 2:]
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(positions)
        x = self.embeddings.LayerNorm(x)
        present = []
        for i, layer in enumerate(self.layers):
            attention = layer.attention.self
            parts = (attention.query, attention.key, attention.value)
            q, k, v = (_by_head(part(x), attention) for part in parts)
            k = self.extended(past[2 * i].index_select(0, order), k, positions)
            v = self.extended(past[2 * i + 1].index_select(0, order), v, positions)
            present += [k, v]
            x = layer.attention.output(_joined(scaled_dot_product_attention(q, k, v, mask)), x)
            seen = _seen(layer.crossattention.self, x, image_kv[2 * i], image_kv[2 * i + 1])
            x = layer.crossattention.output(seen, x)
            x = layer.feed_forward_chunk(x)
        return self.head(x[:, -1]), *present

    def extended(self, past: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        """Texts' keys or values [rows, heads, places, head width] with those of this step's positions [1,
        steps]."""
        return past.index_copy(2, positions[0], new) if self.fixed else torch.cat([past, new], 2)


def step_inputs(ids: Tensor, position: int, order: Tensor, dtype: torch.dtype = torch.float32,
                places: int | None = None) -> tuple[Tensor, ...]:
    """What a `Step` is given as the Decoder takes it: ids, positions [1, steps], mask [1, 1, steps, places],
    order. There are as many places as tokens so far unless the decoder has a fixed number of them."""
    steps = ids.shape[1]
    mask = torch.full((steps, places or position + steps), MASKED, dtype=dtype).triu(position + 1)
    return ids, torch.arange(position, position + steps)[None], mask[None, None], order


def empty_past(decoder: Decoder, rows: int, dtype: torch.dtype = torch.float32,
               places: int = 0) -> list[Tensor]:
    """Keys and values of texts that have not begun."""
    attention = decoder.layers[0].attention.self
    shape = (rows, attention.num_attention_heads, places, attention.attention_head_size)
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * len(decoder.layers))]


def _seen(attention: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Cross-attention of the beams of an image to keys and values that are there once."""
    heads, width = attention.num_attention_heads, attention.attention_head_size
    q = attention.query(x).reshape(keys.shape[0], -1, heads, width).transpose(1, 2)
    return _joined(scaled_dot_product_attention(q, keys, values)).reshape(x.shape[0], -1, heads * width)


def _by_head(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Cut(NamedTuple):
    """The modules of a model; the last two are None where no captions are wanted."""

    vision: Vision
    image_kv: ImageKV | None
    decoder: Decoder | None


def cut(model: Any, captions: bool) -> Cut:
    """The modules of transformers' `model`, on its own weights; those of captions where they are wanted."""
    parts = Cut(Vision(model), ImageKV(model) if captions else None, Decoder(model) if captions else None)
    for part in parts:
        if part is not None:
            part.eval()
    return parts
