"""BERT-CNN: how well a caption and a label belong together (Sabir et al. 2023, "Visual Semantic Relatedness
Dataset for Image Captioning").

    logit = u · relu(max over i of (W [x_i; x_i+1; x_i+2] + b)) + c
    x = BERT([CLS] caption [SEP] label [SEP])

W holds 32 filters over windows of three tokens. Each filter's maximum is taken over all windows of a pair, as
in Kim 2014 (section 2). The sigmoid of the one output is the probability. BERT is the layers of our text
stack without cross-attention, over packed pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_fast.model.config import TextConfig
from blip_fast.model.linear_layer import Linear
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextLayer, TextStream
from blip_fast.model.tokenizer import Tokenizer

CAPTION_TOKENS, LABEL_TOKENS = 40, 24  # at most, with [CLS] and both [SEP]
PAIR_TOKENS = CAPTION_TOKENS + LABEL_TOKENS  # the published length
FILTERS, WINDOW = 32, 3


class Bert(nn.Module):
    """BERT (Devlin et al. 2019) over pairs of texts."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ValueError where the config has cross-attention."""
        super().__init__()
        if config.cross_attention:
            raise ValueError("BERT looks at no image: its config must have cross_attention=False")
        self.config = config
        self.word_embeds = nn.Embedding(config.vocab_size, config.width)
        self.position_embeds = nn.Embedding(config.max_positions, config.width)
        self.type_embeds = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(TextLayer(config, i, ("encoder",)) for i in range(config.layers))

    def forward(self, pairs: PackedTexts, types: Tensor) -> Tensor:
        """Packed pairs (each pair is one text) and their types (int64 [rows], 0 in a pair's first text, 1 in
        its second) → [rows, width]."""
        embeds = (self.word_embeds(pairs.token_ids) + self.position_embeds(pairs.positions())
                  + self.type_embeds(types))
        x = F.dropout(self.norm(embeds), self.config.dropout, self.training)
        stream = TextStream(pairs, "encoder")
        for layer in self.layers:
            (x,) = layer([x], [stream], [False], None, None)
        return x


class BertCnn(nn.Module):
    """BERT, the convolution over its states, and the output."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert
        self.convolution = nn.Conv1d(bert.config.width, FILTERS, WINDOW)
        self.output = Linear(FILTERS, 1)

    def forward(self, pairs: PackedTexts, types: Tensor) -> Tensor:
        """As `Bert`, with at least one pair and at least three tokens in each → logits [pairs]."""
        # Over all rows at once; windows that reach into the next pair are left out.
        windows = self.convolution(self.bert(pairs, types).T[None])[0].T
        pair_of_row = pairs.text_of_row()
        within = windows[pair_of_row[: len(windows)] == pair_of_row[WINDOW - 1 :]]
        highest = torch.segment_reduce(within, "max", lengths=pairs.lengths - (WINDOW - 1))
        return self.output(F.relu(highest))[:, 0]


def pack_pairs(tokenizer: Tokenizer, captions: Sequence[str],
               labels: Sequence[str]) -> tuple[PackedTexts, Tensor]:
    """Pack what `BertCnn` reads: [CLS] caption [SEP] label [SEP] for each pair, and the types of all rows. A
    caption keeps at most 40 tokens and a label 24, 64 together."""
    first = tokenizer.pack(captions, max_tokens=CAPTION_TOKENS)
    second = tokenizer.pack(labels, max_tokens=LABEL_TOKENS + 1).without_first()
    taken_in_turn = torch.arange(2 * len(first)).view(2, len(first)).T.flatten()
    both = PackedTexts.cat([first, second]).select(taken_in_turn)
    types = (torch.arange(len(both)) % 2).repeat_interleave(both.lengths)
    return PackedTexts(both.token_ids, both.offsets[::2].contiguous()), types


def select_pairs(pairs: PackedTexts, types: Tensor, indices: Tensor) -> tuple[PackedTexts, Tensor]:
    """The pairs `indices` (int64 [n], any order) of what `pack_pairs` returned."""
    return pairs.select(indices), PackedTexts(types, pairs.offsets).select(indices).token_ids
