"""The text stack: one BERT-shaped transformer, three modes, over packed texts (BLIP section 3.1, "MED").

| mode                   | self-attention          | cross-attention |
|------------------------|-------------------------|-----------------|
| unimodal encoder       | encoder's, both ways    | off             |
| image-grounded encoder | encoder's, both ways    | on              |
| image-grounded decoder | decoder's, causal       | on              |

A stack that serves both modes shares every parameter but self-attention between them, so texts of both modes pass it
together: each `TextStream` takes its own self-attention, everything else is computed once over all rows.
Cross-attention reads `ImageKV`: keys and values of all layers, projected once per image, shared by all its texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from blip_kernels import attention, cached_attention, linear, row_blocks, sums_depend_on_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_fast.model.config import TextConfig
from blip_fast.model.kv_cache import ImagePool, PromptRows, SelfCache
from blip_fast.model.linear_layer import Linear, behind
from blip_fast.model.packed_texts import PackedTexts

Mode = Literal["encoder", "decoder"]

# float32 products of a multiple of this many rows give a row the same bits whatever their number; with fewer than four
# rows in a thread's share the library changes to another kernel (docs/decisions.md).
ROWS_TOGETHER = 4
DECODED_ROWS = 32  # of a step that AMX multiplies together: two of its tiles


@dataclass(frozen=True)
class TextStream:
    """Texts that pass a stack in one mode.

    `images` [texts] (int64) says which image each text meets; None leaves cross-attention out. With `first_row_only`
    the last layer is computed for each text's first row alone: all that ITC and ITM read.
    """

    texts: PackedTexts
    mode: Mode
    images: Tensor | None = None
    first_row_only: bool = False


@dataclass(frozen=True)
class ImageKV:
    """Cross-attention keys and values of every layer for a batch of images.

    `kv` is one tensor [image rows, layers, 2, heads, head_dim] per eye (two for NLVR2), `offsets` int32 [images + 1].
    """

    kv: tuple[Tensor, ...]
    offsets: Tensor
    _layers: list[list[tuple[Tensor, ...]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Cut up once: the gradient of all cuts is put together in one pass, where each cut of its own would fill and
        # add a tensor as large as all layers'.
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


@dataclass(frozen=True)
class ImageStates:
    """What generated texts look at: visual tokens of images, or states of encoded questions, packed."""

    rows: Tensor  # [rows, vision width]
    offsets: Tensor  # int32 [images + 1]

    def split(self) -> list[ImageStates]:
        """Each image by itself, a view."""
        lengths = self.offsets.diff().tolist()
        return [ImageStates(rows, self.offsets.new_tensor([0, len(rows)])) for rows in self.rows.split(lengths)]


class SelfAttention(nn.Module):
    """norm(x + out(attention(x))). One per mode and layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, offsets: Tensor, causal: bool, first_row_only: bool) -> Tensor:
        """x: [rows, width] → [rows, width], or [texts, width] with `first_row_only` (never with `causal`)."""
        q_offsets = offsets
        if not first_row_only:
            q, k, v = self.project(x)
        else:
            first = offsets[:-1].long()
            if isinstance(self.qkv, Linear):
                width, weight, bias = x.shape[1], self.qkv.weight, self.qkv.bias
                k, v = linear(x, weight[width:], bias[width:]).view(len(x), 2, self.heads, -1).unbind(1)
                x = x.index_select(0, first)
                q = linear(x, weight[:width], bias[:width]).view(len(x), self.heads, -1)
            else:  # packed, quantised, or an adapter around it: the weight is not all that it computes with
                q, k, v = self.project(x)
                x, q = x.index_select(0, first), q.index_select(0, first)
            q_offsets = torch.arange(len(offsets), dtype=torch.int32, device=x.device)
        dropout = self.dropout if self.training else 0.0
        return self.finish(x, attention(q, k, v, q_offsets, offsets, causal=causal, dropout=dropout))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, width] → q, k, v [rows, heads, head_dim]."""
        return self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.out(attended.flatten(1)), self.dropout, self.training))


class CrossAttention(nn.Module):
    """norm(x + out(attention to the image)); with two eyes their outputs are averaged, or merged by a linear layer."""

    FIRST_MERGING_LAYER = 6  # of NLVR2's published model: below it the two eyes are averaged

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        eyes = 2 if config.twin_cross_attention else 1
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.ModuleList(Linear(config.width, config.width) for _ in range(eyes))
        self.out = nn.ModuleList(Linear(config.width, config.width) for _ in range(eyes))
        merges = eyes == 2 and layer >= self.FIRST_MERGING_LAYER
        self.merge = Linear(2 * config.width, config.width) if merges else None
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, rows: RowsByImage, image_kv: ImageKV, layer: int) -> Tensor:
        """x: [rows, width] → the same."""
        seen = []
        dropout = self.dropout if self.training else 0.0
        for query, out, (k, v) in zip(self.query, self.out, image_kv.layer(layer), strict=True):
            q = rows.sort(query(x)).view(len(x), self.heads, -1)
            attended = attention(q, k, v, rows.offsets, image_kv.offsets, dropout=dropout)
            seen.append(out(rows.unsort(attended.flatten(1))))
        if len(seen) == 1:
            merged = seen[0]
        elif self.merge is not None:
            merged = self.merge(torch.cat(seen, dim=-1))
        else:
            merged = (seen[0] + seen[1]) / 2
        return self.finish(x, merged)

    def finish(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.norm(x + F.dropout(seen, self.dropout, self.training))


class FeedForward(nn.Module):
    """norm(x + mlp(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.mlp_in = Linear(config.width, config.mlp_width)
        self.activation = nn.GELU()
        self.mlp_out = Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        hidden = behind(self.activation, self.mlp_out, self.mlp_in(x))
        return self.norm(x + F.dropout(hidden, self.dropout, self.training))


class TextLayer(nn.Module):
    """Self-attention of the stream's mode → cross-attention → feed-forward."""

    def __init__(self, config: TextConfig, layer: int, modes: Sequence[Mode]) -> None:
        super().__init__()
        self.layer = layer
        self.self_attention = nn.ModuleDict({mode: SelfAttention(config) for mode in modes})
        self.cross_attention = CrossAttention(config, layer) if config.cross_attention else None
        self.feed_forward = FeedForward(config)

    def forward(self, x: list[Tensor], streams: Sequence[TextStream], first_rows: Sequence[bool],
                rows: RowsByImage | None, image_kv: ImageKV | None) -> list[Tensor]:
        """x: per stream [rows, width] → the same, or [texts, width] where `first_rows` is set."""
        x = [self.self_attention[s.mode](x_s, s.texts.offsets, s.mode == "decoder", first)
             for x_s, s, first in zip(x, streams, first_rows, strict=True)]
        together = torch.cat(x) if len(x) > 1 else x[0]
        if rows is not None and self.cross_attention is not None and image_kv is not None:
            together = self.cross_attention(together, rows, image_kv, self.layer)
        return list(self.feed_forward(together).split([len(x_s) for x_s in x]))


def image_states(image_embeds: Tensor) -> ImageStates:
    """[images, tokens, vision width], packed."""
    images, tokens = image_embeds.shape[:2]
    offsets = torch.arange(images + 1, dtype=torch.int32, device=image_embeds.device) * tokens
    return ImageStates(image_embeds.flatten(0, 1), offsets)


class TextStack(nn.Module):
    """Embeddings, layers and, for cross-attention, one projection of an image to all layers' keys and values."""

    def __init__(self, config: TextConfig, vision_width: int, modes: Sequence[Mode]) -> None:
        super().__init__()
        self.config, self.modes = config, tuple(modes)
        self.word_embeds = nn.Embedding(config.vocab_size, config.width)
        self.position_embeds = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(TextLayer(config, i, modes) for i in range(config.layers))
        self.recomputed = 0  # see BlipModel.recompute
        eyes = 0 if not config.cross_attention else 2 if config.twin_cross_attention else 1
        self.image_to_kv = nn.ModuleList(
            Linear(vision_width, config.layers * 2 * config.width) for _ in range(eyes))

    def forward(self, streams: Sequence[TextStream], image_kv: ImageKV | None = None) -> list[Tensor]:
        """Pass all streams through the stack together.

        Args:
            streams: texts by mode; all of them name their images, or none does.
            image_kv: from `image_kv`, needed where streams name images.

        Returns:
            Per stream [rows, width], or [texts, width] where the stream is `first_row_only`.

        Raises:
            ValueError: a mode that this stack does not have; images named without `image_kv`, or by some streams only.
        """
        self._check(streams, image_kv)
        # One lookup for all streams: each lookup's gradient is as large as the vocabulary.
        embeds = self._embed(torch.cat([s.texts.token_ids for s in streams]),
                             torch.cat([s.texts.positions() for s in streams]))
        x = [self._dropout(embeds_s) for embeds_s in embeds.split([s.texts.token_ids.numel() for s in streams])]
        rows = last_rows = None
        if image_kv is not None:
            images = len(image_kv.offsets) - 1
            rows = RowsByImage.of(streams, images, [False] * len(streams))
            last_rows = RowsByImage.of(streams, images, [s.first_row_only for s in streams])
        for index, layer in enumerate(self.layers):
            last = self.config.layers - index
            run = partial(checkpoint, layer, use_reentrant=False) if last <= self.recomputed else layer
            first_rows = [s.first_row_only and last == 1 for s in streams]
            x = run(x, streams, first_rows, last_rows if last == 1 else rows, image_kv)
        return x

    def image_kv(self, *image_embeds: Tensor) -> ImageKV:
        """Project images to the keys and values of all layers, one GEMM an eye.

        Args:
            image_embeds: [images, tokens, vision width]; two of them for NLVR2's twin cross-attention.
        """
        if len(image_embeds) != len(self.image_to_kv):
            raise ValueError(f"this text stack looks at {len(self.image_to_kv)} image(s) at a time, "
                             f"got {len(image_embeds)}")
        states = [image_states(embeds) for embeds in image_embeds]
        with row_blocks(image_embeds[0].shape[1]):
            return self.states_kv(*(each.rows for each in states), offsets=states[0].offsets)

    def states_kv(self, *states: Tensor, offsets: Tensor) -> ImageKV:
        """As `image_kv`, of packed rows [rows, vision width] with offsets int32 [images + 1]: VQA's answer decoder
        looks at encoded questions, which differ in length."""
        kv = tuple(project(rows).view(len(rows), self.config.layers, 2, self.config.heads, -1)
                   for project, rows in zip(self.image_to_kv, states, strict=True))
        return ImageKV(kv, offsets)

    @row_blocks(DECODED_ROWS)
    def decode(self, token_ids: Tensor, positions: Tensor, cache: SelfCache, images: ImagePool,
               prompts: PromptRows | None = None) -> Tensor:
        """One step of generation: a token of each row, with the decoder's self-attention over a cache. Without
        gradients.

        A row's result has the same bits whatever the other rows are and however many: see `ROWS_TOGETHER`.

        Args:
            token_ids: int64 [rows], the same number of consecutive rows for each slot of `images` and `cache`.
            positions: int64 [rows], of these tokens in their texts.
            cache: of the tokens before these; these are added.
            prompts: tokens before these that the cache does not hold yet.

        Returns:
            [rows, width], and behind them what fills their number up to a multiple of `ROWS_TOGETHER`.
        """
        rows, dtype = len(token_ids), self.word_embeds.weight.dtype
        cache.place(positions, prompts)
        if prompts is not None:
            token_ids = torch.cat([token_ids, prompts.token_ids])
            positions = torch.cat([positions, prompts.positions])
        computed = len(token_ids)
        fill = -computed % (DECODED_ROWS if sums_depend_on_rows(dtype) else ROWS_TOGETHER)
        x = self._embed(F.pad(token_ids, (0, fill)), F.pad(positions, (0, fill)))

        def filled(*attended: Tensor) -> Tensor:
            parts = [part.flatten(1) for part in attended]
            return torch.cat([*parts, parts[0].new_zeros(fill, x.shape[1])]) if fill or len(parts) > 1 else parts[0]

        for index, module in enumerate(self.layers):
            layer = cast(TextLayer, module)
            self_attention = cast(SelfAttention, layer.self_attention["decoder"])
            cross_attention = layer.cross_attention
            assert cross_attention is not None
            q, k, v = (part[:computed] for part in self_attention.project(x))
            cache.append(index, k, v)
            x = self_attention.finish(x, filled(cache.attend(index, q)))
            q = cross_attention.query[0](x).view(len(x), cross_attention.heads, -1)[:computed]
            seen = [images.attend(index, q[:rows])]
            if prompts is not None:
                seen += [images.attend(index, part, slots) for part, slots in prompts.split(q[rows:])]
            x = cross_attention.finish(x, cross_attention.out[0](filled(*seen)))
            x = layer.feed_forward(x)
        return x[: rows + -rows % ROWS_TOGETHER]

    def decode_tree(self, token_ids: Tensor, paths: Tensor, depths: Tensor, images: Tensor,
                    image_kv: ImageKV) -> Tensor:
        """States of many texts at once that have beginnings in common: a row is a prefix, and reads the keys and values
        of its own tokens in the rows of its shorter prefixes. Without gradients.

        Args:
            token_ids: int64 [rows], the last token of each prefix.
            paths: int64 [rows, longest], the rows of its tokens from the first on, itself at `depths` − 1; what stands
                behind that is not read.
            depths: int64 [rows], how many tokens it has.
            images: int64 [rows], the image that each looks at, never falling; every image has a row.
            image_kv: of the images.

        Returns:
            [rows, width].
        """
        x, lengths = self._embed(token_ids, depths - 1), depths.int()
        by_image = RowsByImage(F.pad(images.bincount().cumsum(0), (1, 0)).int(), None, None)
        for index, module in enumerate(self.layers):
            layer = cast(TextLayer, module)
            self_attention = cast(SelfAttention, layer.self_attention["decoder"])
            assert layer.cross_attention is not None
            x = self_attention.finish(x, cached_attention(*self_attention.project(x), paths, lengths))
            x = layer.cross_attention(x, by_image, image_kv, index)
            x = layer.feed_forward(x)
        return x

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.norm(self.word_embeds(token_ids) + self.position_embeds(positions))

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _check(self, streams: Sequence[TextStream], image_kv: ImageKV | None) -> None:
        for stream in streams:
            if stream.mode not in self.modes:
                raise ValueError(f"this model has no text {stream.mode}: it has {', '.join(self.modes)} only")
            if (stream.images is None) != (image_kv is None):
                raise ValueError("every text stream must name its images when image_kv is given, and none without it")
            if stream.mode == "decoder" and stream.first_row_only:
                raise ValueError("first_row_only is for encoder streams: a decoder's first row is [DEC] alone")


@dataclass(frozen=True)
class RowsByImage:
    """The order in which text rows stand sorted by image, so that each image's rows are one query segment."""

    offsets: Tensor  # int32 [images + 1]
    order: Tensor | None  # int64 [rows]: sorted position → row; None where rows stand sorted
    inverse: Tensor | None  # int64 [rows]: row → sorted position

    @classmethod
    def of(cls, streams: Sequence[TextStream], images: int, first_rows: Sequence[bool]) -> RowsByImage:
        row_image = torch.cat([s.images if first else torch.repeat_interleave(s.images, s.texts.lengths)
                               for s, first in zip(streams, first_rows, strict=True) if s.images is not None])
        order = torch.argsort(row_image, stable=True)
        counts = torch.bincount(row_image, minlength=images)
        return cls(F.pad(counts.cumsum(0), (1, 0)).int(), order, torch.argsort(order))

    def sort(self, x: Tensor) -> Tensor:
        return x if self.order is None else _Permute.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        return x if self.order is None else _Permute.apply(x, self.inverse, self.order)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is a gather too, where autograd's own would scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class LMHead(nn.Module):
    """dense → GELU → norm, then a projection with the word embeddings (`tied`) or a weight of its own, and a bias."""

    def __init__(self, config: TextConfig, tied: bool) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.projection = None if tied else Linear(config.width, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., width], the stack's word embeddings [vocab_size, width] → what `F.linear` makes logits of: states
        [..., width], weight [vocab_size, width], bias [vocab_size]."""
        return self.norm(self.activation(self.dense(hidden))), self.weight(word_embeds), self.bias

    def weight(self, word_embeds: Tensor) -> Tensor:
        """The projection's weight [vocab_size, width]."""
        return word_embeds if self.projection is None else self.projection.weight
