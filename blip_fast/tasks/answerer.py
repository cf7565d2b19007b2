"""Answers to questions about images, written by the decoder or chosen from a list (VQA; BLIP section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from blip_fast.generate import GenerationConfig, generate
from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import ImageStates
from blip_fast.model.tokenizer import Tokenizer, clean_question
from blip_fast.tasks.answer_list import AnswerList, rank_answers
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixel_batches

MAX_TOKENS = 35  # of a question, as published
SHORTLIST = 128  # answers of a list that are compared in full, as published
QUESTIONS = 16  # questions whose answers are computed together
ANSWERING = GenerationConfig(beams=3, max_length=10, min_length=1)  # as published

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """An answer: its text, all token ids ([DEC] first, [SEP] last) and its score.

    The score of a generated answer is its beam score, that of one chosen from a list minus its loss: label-smoothed as
    published, summed over its tokens and [SEP].
    """

    answer: str
    token_ids: list[int]
    score: float


class Answerer(PretrainedTask):
    """Answers questions. `Answerer.from_pretrained("Salesforce/blip-vqa-base")("photo.jpg", ["what is it?"])`.

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
        """Write an answer to each question.

        Args:
            images: one image, which all questions are about, or one for each question. The same image several times
                in a row is encoded once.
            questions: one or many, taken as they are.
            generation: the published search is the default.
            first_token: what a question starts with: `[CLS]` as in transformers, `[ENC]` as in the published code,
                which the published weights were trained with.
            batch_size: images at a time.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: not one question per image; another first token; options that do not fit.
        """
        def answer(pixels: Tensor, packed: PackedTexts, images: Tensor) -> list[Answer]:
            return self.answer_pixels(pixels, packed, generation, images)

        return list(self._answers(images, questions, first_token, batch_size, answer))

    def rank(self, images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str],
             answers: Sequence[str], *, top_k: int = SHORTLIST, n_best: int = 1, first_token: str = "[ENC]",
             batch_size: int = 16) -> list[list[Answer]]:
        """Choose each question's answer from a list, as the published evaluation does.

        Args:
            images, batch_size: as above.
            questions: one or many, cleaned here as published (`clean_question`).
            answers: what there is to choose from (published: 3,128 answers).
            top_k: how many of them, those with the likeliest first tokens, are compared in full.
            n_best: how many are returned of each question, at most `top_k`.
            first_token: what a question starts with, `[ENC]` as published.

        Returns:
            The best answers of each question, best first.

        Raises:
            ImageError, ValueError: as above; there is no answer, or one without a token; `top_k` or `n_best` is less
                than 1.
        """
        choices = self.answer_list(answers)
        questions = [questions] if isinstance(questions, str) else questions

        def rank(pixels: Tensor, packed: PackedTexts, images: Tensor) -> list[list[Answer]]:
            return self.rank_pixels(pixels, packed, choices, images, top_k=top_k, n_best=n_best)

        cleaned = [clean_question(question) for question in questions]
        return list(self._answers(images, cleaned, first_token, batch_size, rank))

    def pack(self, questions: Sequence[str], first_token: str) -> PackedTexts:
        """Questions → at most 35 tokens each, packed."""
        return self.tokenizer.pack(questions, first_token, MAX_TOKENS)

    def answer_list(self, answers: Sequence[str]) -> AnswerList:
        """Answers as `rank_pixels` takes them, on the model's device. Raises ValueError where there is none, one has no
        token, or one has more tokens than the model has positions."""
        choices = AnswerList.of(answers, [self.tokenizer.encode(answer, "[DEC]") for answer in answers])
        longest, room = int(choices.depths.max()) - 1, self.model.config.text.max_positions
        if longest > room:
            raise ValueError(f"the longest answer has {longest} tokens with [DEC]: this model has {room} positions")
        return choices.to(self.model.vision.cls_token.device)

    def answer_pixels(self, pixels: Tensor, questions: PackedTexts, generation: GenerationConfig = ANSWERING,
                      images: Tensor | None = None) -> list[Answer]:
        """Write answers about one batch of images, float [images, 3, image_size, image_size] after the evaluation
        transform. `images` (int64 [questions], never falling) names the image that each question is about; question i
        is about image i unless given."""
        def answer(states: ImageStates) -> list[Answer]:
            count = len(states.offsets) - 1
            texts = generate(self.model, states, [[self.model.config.tokens.bos]] * count, generation)
            return [Answer(self.tokenizer.decode(text.token_ids), text.token_ids, text.score) for text in texts]

        return [found for states in self._question_states(pixels, questions, images) for found in answer(states)]

    def rank_pixels(self, pixels: Tensor, questions: PackedTexts, answers: AnswerList, images: Tensor | None = None, *,
                    top_k: int = SHORTLIST, n_best: int = 1) -> list[list[Answer]]:
        """As `answer_pixels`, each answer chosen from a list; the options are `rank`'s."""
        for name, value in (("top_k", top_k), ("n_best", n_best)):
            if value < 1:
                raise ValueError(f"{name} is {value}: give the number of answers, 1 at least")
        ranked = []
        decoder = self.model.stack("decoder")
        for states in self._question_states(pixels, questions, images):
            question_kv = decoder.states_kv(states.rows, offsets=states.offsets)
            chosen, scores = rank_answers(self.model, question_kv, answers, top_k)
            for places, values in zip(chosen[:, :n_best].tolist(), scores[:, :n_best].tolist(), strict=True):
                ranked.append([Answer(answers.texts[int(place)], answers.token_ids(place), score)
                               for place, score in zip(places, values, strict=True)])
        return ranked

    def _question_states(self, pixels: Tensor, questions: PackedTexts,
                         images: Tensor | None) -> Iterator[ImageStates]:
        """States of the questions in order, a few at a time; an image is encoded once for all of its own."""
        with evaluating(self.model):
            for embeds in encode_images(self.model, [pixels]):
                questions = questions.to(embeds.device)
                about = torch.arange(len(questions)) if images is None else images
                for some in torch.arange(len(questions)).split(QUESTIONS):
                    first, last = int(about[some[0]]), int(about[some[-1]])
                    yield self.model.question_states(embeds[first : last + 1],
                                                     questions.select(some.to(embeds.device)),
                                                     (about[some] - first).to(embeds.device))

    def _answers(self, images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str], first_token: str,
                 batch_size: int, answer: Callable[[Tensor, PackedTexts, Tensor], list[Result]]) -> Iterator[Result]:
        questions = [questions] if isinstance(questions, str) else questions
        packed = self.pack(questions, first_token)
        sources = as_sources(images)
        if len(sources) == 1:
            sources = sources * len(questions)
        if len(questions) != len(sources):
            raise ValueError(f"{len(sources)} images but {len(questions)} questions: pass one question per image")
        about = _runs(sources)
        firsts = [i for i, image in enumerate(about) if i == 0 or image != about[i - 1]]
        image_of_question, done = torch.tensor(about, dtype=torch.int64), 0
        for batch in pixel_batches([sources[i] for i in firsts], self.model.config.vision.image_size, batch_size):
            which = ((image_of_question >= done) & (image_of_question < done + len(batch))).nonzero().flatten()
            yield from answer(batch, packed.select(which), image_of_question[which] - done)
            done += len(batch)


def _runs(sources: Sequence[ImageSource]) -> list[int]:
    """0 for the first image, and one more wherever another follows: the same object, or a path of the same name."""
    runs: list[int] = []
    for i, source in enumerate(sources):
        before = sources[i - 1] if i else None
        same = source is before or (isinstance(source, str | Path) and source == before)
        runs.append(runs[-1] + (not same) if i else 0)
    return runs
