"""FLOPs of one batch of a training step, and bytes that autograd saves for it, as formulas of its sizes.

FLOPs are counted as in `blip_kernels.flops`: only matrix products, a multiply-add as two, nothing on padding;
the backward of attention and LM includes what it recomputes. Saved bytes are a GPU's, with dropout masks only
if there is dropout: inputs of products in the run's precision, inputs of layer norms in float32, except what
is recomputed. All texts are assumed to have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from blip_fast.model.config import BlipConfig, TextConfig
from blip_train.steps.pretraining import Objective

FLOAT32 = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NORM_STATISTICS = 8  # bytes per row: mean and reciprocal standard deviation


class Work(NamedTuple):
    """`forward` and `backward` FLOPs, `saved` bytes from forward to backward."""

    forward: float = 0.0
    backward: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Work:  # type: ignore[override]
        return Work(*(times * value for value in self))


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of one rank's batch: `pairs`; `tokens`, the text tokens of all captions together ([CLS] and
    [SEP] included); `size`, bytes per element in the run's precision; `fetched`, images and as many texts
    from other ranks, as negatives."""

    pairs: float
    tokens: float
    size: int = 2
    fetched: float = 0.0


class _Texts(NamedTuple):
    """Texts of one mode in one pass: how many, their rows, and pairs of rows that attend to each other."""

    texts: float
    rows: float
    pairs: float


def step_work(config: BlipConfig, objective: Objective, batch: BatchSizes, recomputed: int = 0) -> Work:
    """Forward, losses and backward of one batch on one rank.

    Args:
        recomputed: `runtime.recomputed_blocks`. The second forward of those
            blocks, in the backward, is counted.
    """
    contrastive = "itc" in objective.losses
    total = vision_work(config, batch, recomputed)
    if contrastive:
        total += _pass(config, batch, [_texts(batch, 1)], [True], 0.0, recomputed)
        total += _contrastive(config, objective, batch) + momentum_work(config, batch)
    streams, first_rows = [], []
    if "itm" in objective.losses:
        streams, first_rows = [_texts(batch, 3)], [True]
        total += _linear(3 * batch.pairs, config.text.width, 2, batch.size)
    if "lm" in objective.losses:
        rows = batch.tokens - batch.pairs  # the last token predicts nothing
        streams.append(_Texts(batch.pairs, rows, rows * (rows / batch.pairs + 1) / 2))
        first_rows.append(False)
        total += _language(config.text, batch, rows)
    images = batch.pairs + (batch.fetched if "itm" in objective.losses else 0.0)
    if streams and config.text_stacks == "tied":
        total += _pass(config, batch, streams, first_rows, images, recomputed)
    else:
        for stream, first in zip(streams, first_rows, strict=True):
            total += _pass(config, batch, [stream], [first], images, recomputed)
    return total


def vision_work(config: BlipConfig, batch: BatchSizes, recomputed: int = 0) -> Work:
    """The vision transformer on the batch's images, with its backward."""
    vision, rows = config.vision, batch.pairs * config.vision.tokens
    patches = batch.pairs * (vision.tokens - 1)
    embed = _linear(patches, 3 * vision.patch_size**2, vision.width, batch.size)
    block = _vision_block(config, batch, rows, rows * vision.tokens)
    blocks = _blocks(block, vision.layers, recomputed, FLOAT32 * rows * vision.width)
    if recomputed:  # while a block is recomputed, its saved bytes are present; vision blocks keep most
        blocks += Work(saved=block.saved)
    return Work(embed.forward, embed.forward, embed.saved) + blocks + _norm(rows, vision.width)


def momentum_work(config: BlipConfig, batch: BatchSizes) -> Work:
    """Features of the momentum copy: only forward, nothing kept; the last
    vision block computes only [CLS]."""
    vision = config.vision
    full = vision_work(config, batch).forward
    rows = batch.pairs * vision.tokens
    last = _vision_block(config, batch, rows, rows * vision.tokens).forward
    # [CLS] goes through the whole block, other rows only through its first product.
    qkv_rows = rows - batch.pairs
    one = (_vision_block(config, batch, batch.pairs, rows).forward
           + _linear(qkv_rows, vision.width, 3 * vision.width, 0).forward)
    texts = _pass(config, batch, [_texts(batch, 1)], [True], 0.0, 0).forward
    return Work(full - last + one + texts + _projections(config, batch).forward)


def _texts(batch: BatchSizes, copies: int) -> _Texts:
    rows = copies * batch.tokens
    return _Texts(copies * batch.pairs, rows, rows * batch.tokens / batch.pairs)


def _vision_block(config: BlipConfig, batch: BatchSizes, rows: float, pairs: float) -> Work:
    vision, size = config.vision, batch.size
    width, hidden = vision.width, round(vision.width * vision.mlp_ratio)
    # Norms and GELU are recomputed (blip_fast/model/linear_layer.py): their inputs are
    # kept, their outputs are not.
    stream, before_gelu = Work(saved=FLOAT32 * rows * width), Work(saved=size * rows * hidden)
    return (stream + _linear(rows, width, 3 * width, 0)
            + _attention(rows, rows, pairs, width, vision.heads, size) + _linear(rows, width, width, 0)
            + stream + _linear(rows, width, hidden, 0) + before_gelu + _linear(rows, hidden, width, 0))


def _pass(config: BlipConfig, batch: BatchSizes, streams: list[_Texts], first_rows: list[bool], images: float,
          recomputed: int) -> Work:
    """Texts together through the stack, reading the keys and values of `images`
    images; 0: no cross-attention."""
    text, tokens, size = config.text, config.vision.tokens, batch.size
    rows = sum(stream.rows for stream in streams)
    inner = _text_layer(config, size, streams, [False] * len(streams), images)
    last = _text_layer(config, size, streams, first_rows, images)
    masks = rows * text.width * (text.dropout > 0)
    total = _norm(rows, text.width) + Work(saved=masks)
    total += _blocks(inner, text.layers - 1, max(recomputed - 1, 0), FLOAT32 * rows * text.width)
    total += _blocks(last, 1, min(recomputed, 1), FLOAT32 * rows * text.width)
    if images:
        to_kv = _linear(images * tokens, config.vision.width, text.layers * 2 * text.width, size)
        total += to_kv + Work(saved=size * images * tokens * text.layers * 2 * text.width)
    return total


def _text_layer(config: BlipConfig, size: int, streams: list[_Texts], first_rows: list[bool],
                images: float) -> Work:
    text, total, read = config.text, Work(), 0.0
    width = text.width
    for stream, first in zip(streams, first_rows, strict=True):
        asking = stream.texts if first else stream.rows
        pairs = stream.rows if first else stream.pairs
        total += (_linear(stream.rows, width, 2 * width, size)
                  + _linear(asking, width, width, size if first else 0))
        total += (_attention(asking, stream.rows, pairs, width, text.heads, size)
                  + _linear(asking, width, width, 0))
        total += _norm(asking, width)
        read += asking
    if images:
        total += _linear(read, width, width, size) + _attention(read, 0.0, read * config.vision.tokens, width,
                                                                text.heads, size)
        total += _linear(read, width, width, size) + _norm(read, width)  # the unsorted copy is kept
    # Besides the layer's own input, GELU's input is saved.
    total += _linear(read, width, text.mlp_width, size) + Work(saved=size * read * text.mlp_width)
    total += _linear(read, text.mlp_width, width, 0) + _norm(read, width)
    masks = read * width * (3 if images else 2) * (text.dropout > 0)
    return total + Work(saved=masks)


def _contrastive(config: BlipConfig, objective: Objective, batch: BatchSizes) -> Work:
    """ITC in both directions, its projections, and drawing negatives."""
    keys = batch.pairs + objective.queue_size
    product = 2 * 2 * batch.pairs * config.embed_dim * keys
    draws = 2 * 2 * batch.pairs * batch.pairs * config.embed_dim if "itm" in objective.losses else 0.0
    return _projections(config, batch) + Work(2 * product + draws, 3 * product)


def _projections(config: BlipConfig, batch: BatchSizes) -> Work:
    return (_linear(batch.pairs, config.vision.width, config.embed_dim, batch.size)
            + _linear(batch.pairs, config.text.width, config.embed_dim, batch.size))


def _language(text: TextConfig, batch: BatchSizes, rows: float) -> Work:
    """LM's head and loss, whose backward recomputes the logits."""
    logits = 2 * rows * text.width * text.vocab_size
    head = _linear(rows, text.width, text.width, batch.size) + _norm(rows, text.width)
    kept = rows * text.width * (batch.size + FLOAT32)  # inputs of GELU and of the loss
    return head + Work(logits, 3 * logits, kept)


def _blocks(block: Work, layers: int, recomputed: int, kept: float) -> Work:
    """`layers` equal blocks, of which the last `recomputed` keep only their input,
    `kept` bytes, and run twice."""
    twice = min(recomputed, layers)
    again = Work(block.forward, block.forward + block.backward, kept)
    return block * (layers - twice) + again * twice


def _linear(rows: float, wide_in: int, wide_out: int, size: int) -> Work:
    """A linear layer. It keeps its input, `size` bytes per element; 0 if another op keeps it."""
    flops = 2.0 * rows * wide_in * wide_out
    return Work(flops, 2 * flops, size * rows * wide_in)


def _attention(rows: float, key_rows: float, pairs: float, width: int, heads: int, size: int) -> Work:
    """Attention. It keeps queries, keys, values, output and log-sum-exp."""
    kept = size * width * (2 * rows + 2 * key_rows) + FLOAT32 * heads * rows
    return Work(4.0 * pairs * width, 10.0 * pairs * width, kept)


def _norm(rows: float, width: int) -> Work:
    return Work(saved=rows * (FLOAT32 * width + NORM_STATISTICS))
