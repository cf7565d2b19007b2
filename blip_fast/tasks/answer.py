"""Answers to questions about images, written by the decoder (VQA; BLIP section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.generate import Generated, GenerationConfig, generate
from blip_fast.images import ImageSource
from blip_fast.inference import encode_images, evaluating
from blip_fast.model import BlipModel
from blip_fast.packing import PackedTexts
from blip_fast.tasks.loading import PretrainedTask, as_sources, pixel_batches
from blip_fast.tokenizer import Tokenizer

MAX_TOKENS = 35  # of a question, as published
ANSWERING = GenerationConfig(beams=3, max_length=10, min_length=1)  # as published


@dataclass(frozen=True)
class Answer:
    """An answer: its text, all generated token ids ([DEC] first, [SEP] last) and its beam score."""

    answer: str
    token_ids: list[int]
    score: float


class Answerer(PretrainedTask):
    """Answers questions. `Answerer.from_pretrained("Salesforce/blip-vqa-base")(["photo.jpg"], ["what is it?"])`.

    The encoder reads the question while it looks at the image, and the decoder looks at the encoded question. It sees
    the question's own tokens only; transformers and the published code, when they generate, also let it look at the
    padding behind the shorter questions of a batch, so there an answer changes with its batch.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model is not of the question-answering kind."""
        if model.config.text_stacks != "untied":
            raise ValueError("answering needs a model with a question encoder and an answer decoder of its own, this "
                             f"one has text_stacks={model.config.text_stacks!r}: take a VQA checkpoint")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str],
                 generation: GenerationConfig = ANSWERING, *, first_token: str = "[CLS]",
                 batch_size: int = 16) -> list[Answer]:
        """Answer one question about each image.

        Args:
            images: as many as there are questions.
            first_token: what a question starts with: `[CLS]` as in transformers, `[ENC]` as in the published code,
                which the published weights were trained with.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: not one question per image; another first token; sampling options.
        """
        sources = as_sources(images)
        packed = self.tokenizer.pack([questions] if isinstance(questions, str) else questions, first_token, MAX_TOKENS)
        if len(packed) != len(sources):
            raise ValueError(f"{len(sources)} images but {len(packed)} questions: pass one question per image")
        answers: list[Answer] = []
        for batch in pixel_batches(sources, self.model.config.vision.image_size, batch_size):
            which = torch.arange(len(answers), len(answers) + len(batch))
            answers += self.answer_pixels(batch, packed.select(which), generation)
        return answers

    def answer_pixels(self, pixels: Tensor, questions: PackedTexts,
                      generation: GenerationConfig = ANSWERING) -> list[Answer]:
        """Answer question i about image i of one batch, float [images, 3, image_size, image_size]."""
        texts: list[Generated] = []
        with evaluating(self.model):
            for image_embeds in encode_images(self.model, [pixels]):
                device = image_embeds.device
                question_kv = self.model.question_kv(image_embeds, questions.to(device))
                prompts = [[self.model.config.tokens.bos]] * len(image_embeds)
                texts += generate(self.model, question_kv, prompts, generation)
        return [Answer(self.tokenizer.decode(text.token_ids), text.token_ids, text.score) for text in texts]
