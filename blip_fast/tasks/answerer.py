"""Answers to questions about images, generated or chosen from a list (VQA; BLIP section 5.3)."""

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
from blip_fast.model.image_kv import ImageStates
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer, clean_question
from blip_fast.tasks.answer_list import AnswerList, rank_answers
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixel_batches

MAX_TOKENS = 35  # of a question, as published
SHORTLIST = 128  # answers of a list to compare in full, as published
QUESTIONS = 16  # questions per batch
ANSWERING = GenerationConfig(beams=3, max_length=10, min_length=1)  # as published

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """An answer: its text, all token ids ([DEC] first, [SEP] last) and its score.

    A generated answer's score is its beam score. The score of an answer chosen from a list is minus its loss
    (with label smoothing, as published), summed over its tokens and [SEP].
    """

    answer: str
    token_ids: list[int]
    score: float


class Answerer(PretrainedTask):
    """Answers questions about images, with a VQA checkpoint such as `Salesforce/blip-vqa-base`.

    Examples:
        >>> answerer = Answerer.from_pretrained(checkpoint)
        >>> answers = answerer(photo, ["what is it?", "how many dogs are there?"])
        >>> len(answers), type(answers[0].answer)
        (2, <class 'str'>)
        >>> [best] = answerer.rank(photo, "how many dogs are there?", ["one", "two", "three"], n_best=3)
        >>> sorted(answer.answer for answer in best)
        ['one', 'three', 'two']

    The question encoder attends to the image, and the answer decoder attends to the encoded question, without
    padding. When transformers and the published code generate answers, their decoder also attends to the
    padding after the shorter questions of a batch, so their answers depend on the batch.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model is not a question-answering model."""
        if model.config.text_stacks != "untied":
            raise ValueError("answering needs a model with a question encoder and an answer decoder of "
                             f"its own, this one has text_stacks={model.config.text_stacks!r}: take a VQA "
                             "checkpoint")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str],
                 generation: GenerationConfig = ANSWERING, *, first_token: str = "[CLS]",
                 batch_size: int = 16) -> list[Answer]:
        """Generate an answer to each question.

        Args:
            images: one image for all questions, or one per question. An image that is repeated in consecutive
                places is encoded once.
            questions: one or many, used as they are.
            generation: the published search is the default.
            first_token: the first token of a question: `[CLS]` as in transformers, `[ENC]` as in the
                published code, which the published weights were trained with.
            batch_size: images per batch.

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
            images, batch_size: as for `__call__`.
            questions: one or many; they are cleaned as published (`clean_question`).
            answers: the list to choose from (published: 3,128 answers).
            top_k: how many of them to compare in full: those with the likeliest first tokens.
            n_best: how many to return per question, at most `top_k`.
            first_token: the first token of a question, `[ENC]` as published.

        Returns:
            The best answers of each question, best first.

        Raises:
            ImageError, ValueError: as for `__call__`; there is no answer, or one has no token; `top_k` or
                `n_best` is less than 1.
        """
        choices = self.answer_list(answers)
        questions = [questions] if isinstance(questions, str) else questions

        def rank(pixels: Tensor, packed: PackedTexts, images: Tensor) -> list[list[Answer]]:
            return self.rank_pixels(pixels, packed, choices, images, top_k=top_k, n_best=n_best)

        cleaned = [clean_question(question) for question in questions]
        return list(self._answers(images, cleaned, first_token, batch_size, rank))

    def pack(self, questions: Sequence[str], first_token: str) -> PackedTexts:
        """Tokenise questions, at most 35 tokens each."""
        return self.tokenizer.pack(questions, first_token, MAX_TOKENS)

    def answer_list(self, answers: Sequence[str]) -> AnswerList:
        """Answers for `rank_pixels`, on the model's device. Raises ValueError if there is none, or one has no
        token or more tokens than the model has positions."""
        choices = AnswerList.of(answers, [self.tokenizer.encode(answer, "[DEC]") for answer in answers])
        longest, room = int(choices.depths.max()) - 1, self.model.config.text.max_positions
        if longest > room:
            raise ValueError(f"the longest answer has {longest} tokens with [DEC]: this model has "
                             f"{room} positions")
        return choices.to(self.model.vision.cls_token.device)

    def answer_pixels(self, pixels: Tensor, questions: PackedTexts, generation: GenerationConfig = ANSWERING,
                      images: Tensor | None = None) -> list[Answer]:
        """Generate answers about one batch of images, float [images, 3, image_size, image_size] after the
        evaluation transform. `images` (int64 [questions], sorted) is the image of each question; by default
        question i is about image i."""
        def answer(states: ImageStates) -> list[Answer]:
            count = len(states.offsets) - 1
            texts = generate(self.model, states, [[self.model.config.tokens.bos]] * count, generation)
            return [Answer(self.tokenizer.decode(text.token_ids), text.token_ids, text.score)
                    for text in texts]

        return [found for states in self._question_states(pixels, questions, images)
                for found in answer(states)]

    def rank_pixels(self, pixels: Tensor, questions: PackedTexts, answers: AnswerList,
                    images: Tensor | None = None, *, top_k: int = SHORTLIST,
                    n_best: int = 1) -> list[list[Answer]]:
        """`answer_pixels` with answers chosen from a list; the options are those of `rank`."""
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
        """The questions' states in order, a few at a time. Each image is encoded once."""
        with evaluating(self.model):
            for embeds in encode_images(self.model, [pixels]):
                questions = questions.to(embeds.device)
                about = torch.arange(len(questions)) if images is None else images
                for some in torch.arange(len(questions)).split(QUESTIONS):
                    first, last = int(about[some[0]]), int(about[some[-1]])
                    yield self.model.question_states(embeds[first : last + 1],
                                                     questions.select(some.to(embeds.device)),
                                                     (about[some] - first).to(embeds.device))

    def _answers(self, images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str],
                 first_token: str, batch_size: int,
                 answer: Callable[[Tensor, PackedTexts, Tensor], list[Result]]) -> Iterator[Result]:
        questions = [questions] if isinstance(questions, str) else questions
        packed = self.pack(questions, first_token)
        sources = as_sources(images)
        if len(sources) == 1:
            sources = sources * len(questions)
        if len(questions) != len(sources):
            raise ValueError(f"{len(sources)} images but {len(questions)} questions: pass one "
                             "question per image")
        about = _runs(sources)
        firsts = [i for i, image in enumerate(about) if i == 0 or image != about[i - 1]]
        image_of_question, done = torch.tensor(about, dtype=torch.int64), 0
        for batch in pixel_batches([sources[i] for i in firsts],
                                   self.model.config.vision.image_size, batch_size):
            which = ((image_of_question >= done)
                     & (image_of_question < done + len(batch))).nonzero().flatten()
            yield from answer(batch, packed.select(which), image_of_question[which] - done)
            done += len(batch)


def _runs(sources: Sequence[ImageSource]) -> list[int]:
    """Number the runs of equal neighbours, from 0. Equal images are the same object or the same path."""
    runs: list[int] = []
    for i, source in enumerate(sources):
        before = sources[i - 1] if i else None
        same = source is before or (isinstance(source, str | Path) and source == before)
        runs.append(runs[-1] + (not same) if i else 0)
    return runs
