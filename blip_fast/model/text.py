"""The text stack: one BERT-shaped transformer, three modes, over packed texts (BLIP section 3.1, "MED").

| mode                   | self-attention          | cross-attention |
|------------------------|-------------------------|-----------------|
| unimodal encoder       | encoder's, both ways    | off             |
| image-grounded encoder | encoder's, both ways    | on              |
| image-grounded decoder | decoder's, causal       | on              |

A stack that serves both modes shares every parameter but self-attention between them, so texts of both modes
pass it together: each `TextStream` takes its own self-attention, everything else is computed once over all
rows. Cross-attention reads `ImageKV`: keys and values of all layers, projected once per image, shared by all
its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from blip_kernels import attention, cached_attention, row_blocks, sums_depend_on_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_fast.model.config import TextConfig
from blip_fast.model.image_kv import ImageKV, image_states
from blip_fast.model.kv_cache import ImagePool, PromptRows, SelfCache
from blip_fast.model.linear_layer import Linear, layer_after, product_of_few
from blip_fast.model.packed_texts import PackedTexts

Mode = Literal["encoder", "decoder"]

# float32 products of a multiple of this many rows give a row the same bits whatever their number; with fewer
# than four rows in a thread's share the library changes to another kernel (docs/decisions/cpu.md).
ROWS_TOGETHER = 4
DECODED_ROWS = 32  # rows of a step that AMX multiplies together: two of its tiles


@dataclass(frozen=True)
class TextStream:
    """Texts that pass a stack in one mode.

    `images` [texts] (int64) says which image each text meets; None leaves cross-attention out. With
    `first_row_only` the last layer is computed for each text's first row alone: all that ITC and ITM read.
    """

    texts: PackedTexts
    mode: Mode
    images: Tensor | None = None
    first_row_only: bool = False


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
            # Only the queries of first rows are needed, but the keys and values of all rows.
            x, q, kv = product_of_few(self.qkv, x, offsets[:-1].long(), x.shape[1])
            q = q.view(len(q), self.heads, -1)
            k, v = kv.view(len(kv), 2, self.heads, -1).unbind(1)
            q_offsets = torch.arange(len(offsets), dtype=torch.int32, device=x.device)
        dropout = self.dropout if self.training else 0.0
        return self.finish(x, attention(q, k, v, q_offsets, offsets, causal=causal, dropout=dropout))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[rows, width] → q, k, v [rows, heads, head_dim]."""
        return self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.out(attended.flatten(1)), self.dropout, self.training))


class CrossAttention(nn.Module):
    """norm(x + out(attention to the image)); with two eyes their outputs are averaged, or merged by a linear
    layer."""

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
        dropout = self.dropout if self.training else 0.0

        def attend(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
            attended = attention(rows.sort(q), k, v, rows.offsets, image_kv.offsets, dropout=dropout)
            return rows.unsort(attended)

        return self.look(x, [partial(attend, k, v) for k, v in image_kv.layer(layer)])

    def look(self, x: Tensor, attend: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """As `forward`, with attention of the caller's: per eye, q [rows, heads, head_dim] → the same."""
        seen = [out(attend_eye(query(x).view(len(x), self.heads, -1)).flatten(1))
                for query, out, attend_eye in zip(self.query, self.out, attend, strict=True)]
        if len(seen) == 1:
            merged = seen[0]
        elif self.merge is not None:
            merged = self.merge(torch.cat(seen, dim=-1))
        else:
            merged = (seen[0] + seen[1]) / 2
        return self.norm(x + F.dropout(merged, self.dropout, self.training))


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
        hidden = layer_after(self.activation, self.mlp_out, self.mlp_in(x))
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

    def decode(self, x: Tensor, attend_self: Callable[[int, Tensor, Tensor, Tensor], Tensor],
               attend_image: Callable[[int, Tensor], Tensor]) -> Tensor:
        """A decoder's layer whose caller computes attention. x: [rows, width] → the same.

        Args:
            attend_self: the layer's index, q, k and v, each [rows, heads, head_dim] → what each row sees of
                its text, of q's shape or [rows, width].
            attend_image: the layer's index and q → what each row sees of its image.
        """
        self_attention = cast(SelfAttention, self.self_attention["decoder"])
        assert self.cross_attention is not None
        x = self_attention.finish(x, attend_self(self.layer, *self_attention.project(x)))
        x = self.cross_attention.look(x, [partial(attend_image, self.layer)])
        return self.feed_forward(x)


class TextStack(nn.Module):
    """Embeddings, layers and, for cross-attention, one projection of an image to all layers' keys and
    values."""

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
            ValueError: a mode that this stack does not have; images named without `image_kv`, or by some
                streams only.
        """
        self._check(streams, image_kv)
        # One lookup for all streams: each lookup's gradient is as large as the vocabulary.
        embeds = self._embed(torch.cat([s.texts.token_ids for s in streams]),
                             torch.cat([s.texts.positions() for s in streams]))
        rows_of_streams = [s.texts.token_ids.numel() for s in streams]
        x = [self._dropout(embeds_s) for embeds_s in embeds.split(rows_of_streams)]
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
        """Project images to the keys and values of all layers, one GEMM per eye.

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
        """As `image_kv`, for packed rows [rows, vision width] with offsets int32 [images + 1]: VQA's answer
        decoder looks at encoded questions, which differ in length."""
        kv = tuple(project(rows).view(len(rows), self.config.layers, 2, self.config.heads, -1)
                   for project, rows in zip(self.image_to_kv, states, strict=True))
        return ImageKV(kv, offsets)

    @row_blocks(DECODED_ROWS)
    def decode(self, token_ids: Tensor, positions: Tensor, cache: SelfCache, images: ImagePool,
               prompts: PromptRows | None = None) -> Tensor:
        """One step of generation: a token of each row, with the decoder's self-attention over a cache.
        Without gradients.

        A row's result has the same bits whatever the other rows are and however many there are: see
        `ROWS_TOGETHER`.

        Args:
            token_ids: int64 [rows], the same number of consecutive rows for each slot of `images` and
                `cache`.
            positions: int64 [rows], of these tokens in their texts.
            cache: holds the tokens before these; these are added to it.
            prompts: tokens before these that the cache does not hold yet.

        Returns:
            [rows, width], and after them rows without meaning, up to a multiple of `ROWS_TOGETHER`.
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
            if fill == 0 and len(parts) == 1:
                return parts[0]
            return torch.cat([*parts, parts[0].new_zeros(fill, self.config.width)])

        def attend_self(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(layer, k[:computed], v[:computed])
            return filled(cache.attend(layer, q[:computed]))

        def attend_image(layer: int, q: Tensor) -> Tensor:
            seen = [images.attend(layer, q[:rows])]
            if prompts is not None:
                seen += [images.attend(layer, part, slots)
                         for part, slots in prompts.split(q[rows:computed])]
            return filled(*seen)

        for layer in self.layers:
            x = layer.decode(x, attend_self, attend_image)  # type: ignore[operator]
        return x[: rows + -rows % ROWS_TOGETHER]

    def decode_tree(self, token_ids: Tensor, paths: Tensor, depths: Tensor, images: Tensor,
                    image_kv: ImageKV) -> Tensor:
        """States of many texts at once that share beginnings. A row is a prefix: it reads the keys and values
        of its tokens in the rows of its shorter prefixes. Without gradients.

        Args:
            token_ids: int64 [rows], the last token of each prefix.
            paths: int64 [rows, longest], the rows of each prefix's tokens from the first on. The prefix
                itself is at `depths` − 1; what comes after that is not read.
            depths: int64 [rows], how many tokens each prefix has.
            images: int64 [rows], the image that each row looks at, in ascending order. Every image has a row.
            image_kv: of the images.

        Returns:
            [rows, width].
        """
        lengths = depths.int()
        q_offsets = F.pad(images.bincount().cumsum(0), (1, 0)).int()

        def attend_self(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cached_attention(q, k, v, paths, lengths)

        def attend_image(layer: int, q: Tensor) -> Tensor:
            ((k, v),) = image_kv.layer(layer)
            return attention(q, k, v, q_offsets, image_kv.offsets)

        x = self._embed(token_ids, depths - 1)
        for layer in self.layers:
            x = layer.decode(x, attend_self, attend_image)  # type: ignore[operator]
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
                raise ValueError("every text stream must name its images when image_kv is given, and none "
                                 "without it")
            if stream.mode == "decoder" and stream.first_row_only:
                raise ValueError("first_row_only is for encoder streams: a decoder's first row is [DEC] "
                                 "alone")


@dataclass(frozen=True)
class RowsByImage:
    """The order that sorts text rows by image, so that each image's rows are one query segment."""

    offsets: Tensor  # int32 [images + 1]
    order: Tensor  # int64 [rows]: sorted position → row
    inverse: Tensor  # int64 [rows]: row → sorted position

    @classmethod
    def of(cls, streams: Sequence[TextStream], images: int, first_rows: Sequence[bool]) -> RowsByImage:
        row_image = torch.cat([s.images if first else torch.repeat_interleave(s.images, s.texts.lengths)
                               for s, first in zip(streams, first_rows, strict=True) if s.images is not None])
        order = torch.argsort(row_image, stable=True)
        counts = torch.bincount(row_image, minlength=images)
        return cls(F.pad(counts.cumsum(0), (1, 0)).int(), order, torch.argsort(order))

    def sort(self, x: Tensor) -> Tensor:
        return _Permute.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        return _Permute.apply(x, self.inverse, self.order)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is a gather too, where autograd's own would scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
