"""transformers' BLIP cut into three modules that can be exported and compiled, for peers at their best.

Attention is PyTorch's fused one. An image's keys and values are projected once and shared by its beams, and
texts keep their keys and values between steps. Of these, transformers' `generate` does only the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

INPUTS = ("ids", "positions", "mask", "order")  # names of the values of `step_inputs`
MASKED = -3e4  # added to masked logits: far below any product, and finite in every dtype

Step = Callable[[Tensor, int, Tensor], Tensor]
"""Arguments: tokens, int64 [rows, steps]; the position of the first one; and for each row the row of the
previous step that it continues, int64 [rows]. Returns the last token's logits, float32 [rows, vocabulary]. An
image's beams are consecutive rows."""


class Peer(NamedTuple):
    """An implementation.

    Attributes:
        encode: pixels float32 [images, 3, size, size] → image embeds [images, tokens, width].
        begin: image embeds → the step function of their captions; None if the peer does not caption.
        own_threads: whether it runs in its own threads rather than PyTorch's.
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
    """The values of `step_inputs`, the texts' keys and values so far, and the images' keys and values → the
    last token's logits [rows, vocabulary], and the texts' keys and values including this step's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.fixed = False  # whether texts' keys and values are allocated at full length
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
            x = layer.attention.output(_join_heads(scaled_dot_product_attention(q, k, v, mask)), x)
            seen = _cross_attention(layer.crossattention.self, x, image_kv[2 * i], image_kv[2 * i + 1])
            x = layer.crossattention.output(seen, x)
            x = layer.feed_forward_chunk(x)
        return self.head(x[:, -1]), *present

    def extended(self, past: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        """Texts' keys or values [rows, heads, places, head width], extended by those of this step's positions
        [1, steps]."""
        return past.index_copy(2, positions[0], new) if self.fixed else torch.cat([past, new], 2)


def step_inputs(ids: Tensor, position: int, order: Tensor, dtype: torch.dtype = torch.float32,
                places: int | None = None) -> tuple[Tensor, ...]:
    """A `Step`'s arguments in the Decoder's form: ids, positions [1, steps], mask [1, 1, steps, places],
    order. There are as many places as tokens so far, unless the decoder has a fixed number of them."""
    steps = ids.shape[1]
    mask = torch.full((steps, places or position + steps), MASKED, dtype=dtype).triu(position + 1)
    return ids, torch.arange(position, position + steps)[None], mask[None, None], order


def empty_past(decoder: Decoder, rows: int, dtype: torch.dtype = torch.float32,
               places: int = 0) -> list[Tensor]:
    """Keys and values of texts without tokens."""
    attention = decoder.layers[0].attention.self
    shape = (rows, attention.num_attention_heads, places, attention.attention_head_size)
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * len(decoder.layers))]


def _cross_attention(attention: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Cross-attention of an image's beams to its keys and values, which are stored once."""
    heads, width = attention.num_attention_heads, attention.attention_head_size
    q = attention.query(x).reshape(keys.shape[0], -1, heads, width).transpose(1, 2)
    return _join_heads(scaled_dot_product_attention(q, keys, values)).reshape(x.shape[0], -1, heads * width)


def _by_head(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Cut(NamedTuple):
    """The modules of a model. The last two are None without captions."""

    vision: Vision
    image_kv: ImageKV | None
    decoder: Decoder | None


def cut(model: Any, captions: bool) -> Cut:
    """Cut transformers' `model` into modules that share its weights; those for captions only if requested."""
    parts = Cut(Vision(model), ImageKV(model) if captions else None, Decoder(model) if captions else None)
    for part in parts:
        if part is not None:
            part.eval()
    return parts
