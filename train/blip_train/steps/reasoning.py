"""NLVR2 fine-tuning (BLIP section 5.4): is a sentence true of two images? Each image
has its own cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_train.steps.step import StepContext, StepOutput, TrainingStep

if TYPE_CHECKING:
    from blip_fast.data.input.decoding import ReadBatch


@dataclass(frozen=True)
class PairBatch:
    """One rank's pairs of images: `images` [batch, 2, 3, size, size], one sentence about each pair, starting
    with [ENC], and `labels` int64 [batch], 1 where the sentence is true."""

    images: Tensor
    sentences: PackedTexts
    labels: Tensor

    @property
    def text_tokens(self) -> int:
        return len(self.sentences.token_ids)

    @classmethod
    def collate(cls, read: ReadBatch, tokenizer: Tokenizer, max_tokens: int) -> PairBatch:
        """Read samples → a batch. Their captions are the sentences."""
        labels = torch.tensor([record["label"] for record in read.records], dtype=torch.int64)
        return cls(read.images, tokenizer.pack(read.captions, "[ENC]", max_tokens), labels)

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(self.images.to(device), self.sentences.to(device), self.labels.to(device))


class Reasoning(TrainingStep):
    """Loss `reasoning`: two-way cross-entropy of the reasoning head's logits."""

    def __init__(self, model: BlipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch, context: StepContext) -> StepOutput:
        embeds = self.model.encode_images(batch.images.flatten(0, 1)).unflatten(0, (-1, 2))
        logits = self.model.pair_logits(embeds, batch.sentences)
        return StepOutput({"reasoning": F.cross_entropy(logits, batch.labels)})
