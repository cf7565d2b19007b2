"""VQA fine-tuning (BLIP section 5.3).

The encoder reads the question and attends to the image. The decoder attends to the encoded question and
learns all answers that people gave, each weighted by its share of the votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from blip_kernels import linear_cross_entropy
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream
from blip_fast.model.tokenizer import Tokenizer, clean_question
from blip_train.steps.step import StepContext, StepOutput, TrainingStep

if TYPE_CHECKING:
    from blip_fast.data.input.decoding import ReadBatch


@dataclass(frozen=True)
class QuestionBatch:
    """One rank's questions, one about each of `images` [batch, 3, size, size].

    `questions` start with [ENC]. `answers`, those of all questions in a row, start with [DEC]. `question_of`
    int64 [answers] is each answer's question, `weights` float32 [answers] its weight.
    """

    images: Tensor
    questions: PackedTexts
    answers: PackedTexts
    question_of: Tensor
    weights: Tensor

    @property
    def text_tokens(self) -> int:
        return len(self.questions.token_ids) + len(self.answers.token_ids)

    @classmethod
    def collate(cls, read: ReadBatch, tokenizer: Tokenizer, max_tokens: int, max_words: int) -> QuestionBatch:
        """Read samples → a batch. Questions are cleaned and cut at `max_words` and `max_tokens`; answers are
        kept as they are. Raises ValueError for a sample without question or answers."""
        for record in read.records:
            if record.get("answers") is None:
                raise ValueError(f"{record['image']} has no question with answers: VQA needs rows with "
                                 "\"question\" and \"answers\"")
        questions = [clean_question(record["question"], max_words) for record in read.records]
        answers = [(text, weight, i) for i, record in enumerate(read.records)
                   for text, weight in answer_weights(record["answers"]).items()]
        texts, weights, question_of = zip(*answers, strict=True)
        return cls(read.images, tokenizer.pack(questions, "[ENC]", max_tokens),
                   tokenizer.pack(texts, "[DEC]"),
                   torch.tensor(question_of), torch.tensor(weights, dtype=torch.float32))

    def to(self, device: torch.device) -> QuestionBatch:
        return QuestionBatch(self.images.to(device), self.questions.to(device), self.answers.to(device),
                             self.question_of.to(device), self.weights.to(device))


def answer_weights(answers: list[str] | dict[str, float]) -> dict[str, float]:
    """Each distinct answer's share of the votes. Given weights (Visual Genome's 0.2) are kept."""
    if isinstance(answers, dict):
        return answers
    return {answer: answers.count(answer) / len(answers) for answer in dict.fromkeys(answers)}


class _AnswerLoss(nn.Module):
    """A module because ZeRO 3 gathers weights for the forward and backward of the module that reads them, and
    this loss reads the word embeddings."""

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, model: BlipModel, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Decoder states [rows, width], target tokens int64 [rows] and their
        weights [rows] → Σ weight · CE."""
        losses = linear_cross_entropy(*model.vocabulary_projection(hidden), targets, reduction="none",
                                      label_smoothing=self.label_smoothing)
        return losses @ weights


class Answering(TrainingStep):
    """Loss `answer`: Σ over answers of weight × sum of the answer's token losses,
    divided by the number of images."""

    def __init__(self, model: BlipModel, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.loss = model, _AnswerLoss(label_smoothing)

    def forward(self, batch: QuestionBatch, context: StepContext) -> StepOutput:
        question_kv = self.model.question_kv(self.model.encode_images(batch.images), batch.questions)
        texts, targets = batch.answers.without_last(), batch.answers.without_first()
        (hidden,) = self.model.stack("decoder")([TextStream(texts, "decoder", batch.question_of)],
                                                question_kv)
        total = self.loss(self.model, hidden, targets.token_ids, batch.weights[targets.text_of_row()])
        return StepOutput({"answer": total / len(batch.images)})
