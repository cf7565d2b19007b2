"""VisDial fine-tuning (BLIP section 5.5): does an answer fit a question, given the image, its caption and the
earlier rounds? Each round contributes its right answer and some of its wrong candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.dialog_ranking import Dialogue, Round, candidate_texts, captioned_kv
from blip_train.steps.step import StepContext, StepOutput, TrainingStep

if TYPE_CHECKING:
    from blip_fast.data.input.decoding import ReadBatch

WRONG = 3  # wrong candidates per round and step; the paper does not say how many


@dataclass(frozen=True)
class DialogueBatch:
    """One rank's dialogues, one about each of `images` [batch, 3, size, size],
    whose `captions` start with [CLS].

    `texts` start with [ENC] and end with an answer. `image_of` int64 [texts] is each text's image; `labels`
    int64 [texts] is 1 where the answer is right.
    """

    images: Tensor
    captions: PackedTexts
    texts: PackedTexts
    image_of: Tensor
    labels: Tensor

    @property
    def text_tokens(self) -> int:
        return len(self.captions.token_ids) + len(self.texts.token_ids)

    @classmethod
    def collate(cls, read: ReadBatch, tokenizer: Tokenizer, max_tokens: int) -> DialogueBatch:
        """Read samples → a batch: of every round with candidates the right one and `WRONG` others.

        The draw of the others is seeded by the keys of the batch's samples in their order. The order changes
        from epoch to epoch, but a batch that a resumed run reads again is the same. Texts longer than
        `max_tokens` lose their earliest rounds.

        Raises ValueError for a sample without any round that has candidates and says which is right.
        """
        rng, texts, image_of, labels = np.random.default_rng(crc32(" ".join(read.keys).encode())), [], [], []
        for i, (record, caption) in enumerate(zip(read.records, read.captions, strict=True)):
            rounds = [Round(one["question"], one.get("answer", ""), _candidates(one, rng))
                      for one in record.get("dialog", [])]
            asked = [number for number, one in enumerate(rounds) if one.candidates]
            if not asked:
                raise ValueError(f'{record["image"]} has no round with "candidates" and "right": VisDial needs rows '
                                 'with a "dialog" of such rounds')
            for number in asked:
                here = candidate_texts(tokenizer, Dialogue(caption, rounds), number, "attention", max_tokens)
                texts += here
                image_of += [i] * len(here)
                labels += [1] + [0] * (len(here) - 1)
        return cls(read.images, tokenizer.pack(read.captions), PackedTexts.from_lists(texts),
                   torch.tensor(image_of), torch.tensor(labels))

    def to(self, device: torch.device) -> DialogueBatch:
        return DialogueBatch(self.images.to(device), self.captions.to(device), self.texts.to(device),
                             self.image_of.to(device), self.labels.to(device))


def _candidates(one: dict[str, Any], rng: np.random.Generator) -> list[str]:
    """A round's right candidate, then `WRONG` others; nothing if the round does not say which is right."""
    if "right" not in one:
        return []
    candidates = one["candidates"]
    wrong = [text for i, text in enumerate(candidates) if i != one["right"]]
    return [candidates[one["right"]], *(wrong[i] for i in rng.permutation(len(wrong))[:WRONG])]


class Dialogues(TrainingStep):
    """Loss `dialogue`: two-way cross-entropy of the matching head's logits, averaged over texts."""

    def __init__(self, model: BlipModel) -> None:
        """Raises ValueError if the model's images and texts differ in width."""
        super().__init__()
        widths = model.config.vision.width, model.config.text.width
        if widths[0] != widths[1]:
            raise ValueError(f"this model's images are {widths[0]} wide and its texts {widths[1]}, so a "
                             "caption cannot join the image in one segment: start from a model with one width, such "
                             "as ViT-B")
        self.model = model

    def forward(self, batch: DialogueBatch, context: StepContext) -> StepOutput:
        seen = captioned_kv(self.model, self.model.encode_images(batch.images), batch.captions)
        logits = self.model.match_logits(batch.texts, batch.image_of, seen)
        return StepOutput({"dialogue": F.cross_entropy(logits, batch.labels)})
