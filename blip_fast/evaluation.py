"""Evaluates a model on annotated images: retrieval, captioning, VQA, pairs with statements (NLVR2) and
dialogues (VisDial). Used by `blip-fast evaluate`, by training reports and by the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import ImageError, StoredImage
from blip_fast.metrics.captions import CaptionMetrics, check_references
from blip_fast.metrics.dialog import dialog_figures, ndcg
from blip_fast.metrics.language import caption_loss, unigram_cross_entropy, unigram_entropy
from blip_fast.metrics.pairs import pair_accuracy, pair_consistency
from blip_fast.metrics.recall import chance_recalls
from blip_fast.metrics.vqa import VOTES, commonest_answer, normalised_answer, vqa_accuracy
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer, clean_caption, clean_question
from blip_fast.parallel.ranks import ALONE, Ranks
from blip_fast.scenes.scenes import scene_from_slots
from blip_fast.scenes.slots import SlotScores, slot_scores
from blip_fast.tasks.answerer import ANSWERING, SHORTLIST, Answerer
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.dialog_ranking import DialogRanker, Dialogue
from blip_fast.tasks.matcher import Matcher, image_of_each
from blip_fast.tasks.model_loading import read_pixels
from blip_fast.tasks.ranking import RetrievalResult
from blip_fast.tasks.reasoner import Reasoner
from blip_fast.tasks.retriever import retrieve

RETRIEVAL_TOKENS = 35  # per text, as published
CAPTION_TOKENS = 40
BATCH = 32

Track = Callable[[Iterable[AnnotatedImage]], Iterable[AnnotatedImage]]


@dataclass(frozen=True)
class CaptionEvaluation:
    """`captions` are the model's captions without the prompt, one per image.

    `loss` is the model's loss on the human captions. `unigram_entropy` is the entropy of their own token
    frequencies, which no model without image and context can beat. `unigram_cross_entropy` is their
    cross-entropy under the training captions' token frequencies, None without training captions. All are in
    nats per token, [SEP] included. `slots` is set if every image is a drawn scene; `metrics` is empty unless
    metrics were requested.
    """

    captions: list[str]
    loss: float
    unigram_entropy: float
    unigram_cross_entropy: float | None
    slots: SlotScores | None
    metrics: dict[str, float]


def evaluate_retrieval(model: BlipModel, tokenizer: Tokenizer, images: Sequence[AnnotatedImage], *,
                       top_k: int = 256, first_token: str = "[ENC]", track: Track = iter,
                       progress: Callable[[int, int], None] | None = None) -> tuple[RetrievalResult, Tensor]:
    """Retrieve among all images and all their captions, which are cleaned as in training.

    Args:
        top_k, first_token, progress: see `retrieve`.
        track: wraps the images while they are read (a progress bar).

    Returns:
        The result and, for its `recalls`, image_of_text int64 [texts].

    Raises:
        ValueError: an image has no caption.
        ImageError: for the first image that cannot be read.
    """
    if bare := next((image.name for image in images if not image.captions), None):
        raise ValueError(f"{bare} has no caption: retrieval needs one at least of every image")
    image_of_text = torch.tensor([i for i, image in enumerate(images) for _ in image.captions])
    texts = tokenizer.pack([clean_caption(caption) for image in images for caption in image.captions],
                           max_tokens=RETRIEVAL_TOKENS)
    batches = _pixel_batches(track(images), model)
    return retrieve(model, batches, texts, top_k, first_token=first_token, progress=progress), image_of_text


def evaluate_captions(captioner: Captioner, images: Sequence[AnnotatedImage], generation: GenerationConfig, *,
                      prompt: str, train_captions: Sequence[str] = (), metrics: CaptionMetrics | None = None,
                      track: Track = iter) -> CaptionEvaluation:
    """Caption every image, and compute the model's loss on the human captions.

    Args:
        prompt: the beginning of captions, in generation and in the loss, where its tokens do not count.
        train_captions: for `unigram_cross_entropy`.
        metrics: caption metrics to compute as well.
        track: wraps the images while they are captioned.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: there is no caption at all, or `metrics` are given and an image has no caption with a
            word.
    """
    if metrics is not None:
        check_references((image.name, image.captions) for image in images)
    model, prompt_tokens = captioner.model, len(captioner.prompt_ids(prompt))
    written: list[str] = []

    def captioned_batches() -> Iterator[Tensor]:
        """Each image is read only once: it is captioned on its way to the loss."""
        for pixels in _pixel_batches(track(images), model):
            written.extend(c.caption
                           for c in captioner.caption_pixels(pixels, prompt, generation, strip_prompt=True))
            yield pixels

    image_of_text = torch.tensor([i for i, image in enumerate(images) for _ in image.captions],
                                 dtype=torch.int64)
    texts = _pack_with_prompt(captioner.tokenizer,
                              [caption for image in images for caption in image.captions], prompt)
    loss = caption_loss(model, captioned_batches(), texts, image_of_text, prompt_tokens)
    cross_entropy = None
    if train_captions:
        train = _pack_with_prompt(captioner.tokenizer, train_captions, prompt)
        cross_entropy = unigram_cross_entropy(train, texts, captioner.tokenizer.vocab_size, prompt_tokens)
    scenes = [scene_from_slots(image.row["scene"]) for image in images if "scene" in image.row]
    return CaptionEvaluation(written, loss, unigram_entropy(texts, prompt_tokens), cross_entropy,
                             slot_scores(written, scenes) if len(scenes) == len(images) else None,
                             metrics(written, [image.captions for image in images])
                             if metrics is not None else {})


def itm_score(matcher: Matcher, images: Sequence[AnnotatedImage], captions: Sequence[str], *,
              track: Track = iter) -> float:
    """How well captions describe their images, without references: the matching head's mean probability that
    caption and image match. Captions are cleaned as in training and follow [ENC]; a caption that is empty
    after cleaning has probability 0.

    Args:
        matcher: preferably not a part of the model that wrote the captions.
        captions: one per image.
        track: wraps the images while they are read.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: there is no image, or the number of captions differs.
    """
    if not images or len(captions) != len(images):
        raise ValueError("one caption an image is needed, "
                         f"got {len(captions)} captions of {len(images)} images")
    cleaned = [clean_caption(caption) for caption in captions]
    total, done = 0.0, 0
    for pixels in _pixel_batches(track(images), matcher.model):
        nonempty = [i for i in range(len(pixels)) if cleaned[done + i]]
        packed = matcher.pack([cleaned[done + i] for i in nonempty], "[ENC]")
        total += float(
            matcher.score_pairs(pixels, packed, torch.tensor(nonempty, dtype=torch.int64)).itm.double().sum()
        )
        done += len(pixels)
    return total / len(images)


@dataclass(frozen=True)
class AnswerEvaluation:
    """`answers` are the model's, one per question. `vqa_accuracy` is the official accuracy and `by_type` that
    of each answer type named in rows; they are None and empty unless every question has ten human answers.
    `commonest` is the share of answers equal to the most common human answer, None unless every question has
    a human answer."""

    answers: list[str]
    vqa_accuracy: float | None
    by_type: dict[str, float]
    commonest: float | None


def evaluate_answers(answerer: Answerer, images: Sequence[AnnotatedImage],
                     generation: GenerationConfig = ANSWERING, *, choices: Sequence[str] = (),
                     top_k: int = SHORTLIST, first_token: str = "[ENC]", track: Track = iter,
                     ranks: Ranks = ALONE) -> AnswerEvaluation:
    """Answer the `question` of every row, as published: cleaned, after [ENC].

    Args:
        generation: how answers are generated if there are no `choices`.
        choices: the answers to choose from; `top_k` of them are compared in full.
        first_token: the token that a question starts with.
        track: wraps the images while they are read. The image of several consecutive questions is read once.
        ranks: the images are divided among these; every rank gets the result.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: a row has no question, no choice has a token, or the first token is unknown.
    """
    if silent := next((image.name for image in images if "question" not in image.row), None):
        raise ValueError(f'{silent} has no "question": VQA needs one in every row')
    groups = [list(same) for _, same in groupby(images, lambda image: image.name)]
    listed = answerer.answer_list(choices) if choices else None

    def answer(groups: list[list[AnnotatedImage]]) -> list[list[str]]:
        answers: list[list[str]] = []
        for pixels in _pixel_batches(track([group[0] for group in groups]), answerer.model):
            here = [[clean_question(image.row["question"]) for image in group]
                    for group in groups[len(answers) : len(answers) + len(pixels)]]
            packed, about = (answerer.pack([text for mine in here for text in mine], first_token),
                             image_of_each(here))
            found = (answerer.answer_pixels(pixels, packed, generation, about) if listed is None else
                     [best[0] for best in answerer.rank_pixels(pixels, packed, listed, about, top_k=top_k)])
            in_order = iter(found)
            answers += [[each.answer for each in islice(in_order, len(mine))] for mine in here]
        return answers

    answers = [answer for mine in ranks.share(answer, groups) for answer in mine]
    return _score_answers(answers, [image.row for image in images])


def _score_answers(answers: list[str], rows: Sequence[dict[str, Any]]) -> AnswerEvaluation:
    if not all(row["answers"] for row in rows):
        return AnswerEvaluation(answers, None, {}, None)
    # Weights are no numbers of people: take the answer with the largest weight as the commonest.
    human = [given if isinstance(given, list) else [max(given, key=given.__getitem__)]
             for given in (row["answers"] for row in rows)]
    both = list(zip(answers, human, strict=True))
    commonest = sum(normalised_answer(answer) == commonest_answer(votes)
                    for answer, votes in both) / len(both)
    if any(len(votes) != VOTES for votes in human):
        return AnswerEvaluation(answers, None, {}, commonest)
    accuracies = [vqa_accuracy(answer, votes) for answer, votes in both]
    of_type: dict[str, list[float]] = {}
    for row, accuracy in zip(rows, accuracies, strict=True):
        if "answer_type" in row:
            of_type.setdefault(row["answer_type"], []).append(accuracy)
    by_type = {name: sum(mine) / len(mine) for name, mine in of_type.items()}
    return AnswerEvaluation(answers, sum(accuracies) / len(accuracies), by_type, commonest)


@dataclass(frozen=True)
class PairEvaluation:
    """`judged` says for each pair whether its sentence was judged true. For `consistency`, the pairs of a
    sentence are those with the same `sentence_id`, or else the same caption."""

    judged: list[bool]
    accuracy: float
    consistency: float


def evaluate_pairs(reasoner: Reasoner, images: Sequence[AnnotatedImage], *, track: Track = iter,
                   ranks: Ranks = ALONE) -> PairEvaluation:
    """Judge the caption of every pair of images (NLVR2). The pairs are divided among `ranks`.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: a row has no second image, or not exactly one caption.
    """
    for image in images:
        if image.second is None or len(image.captions) != 1:
            raise ValueError(f'{image.name} is no pair with a sentence: '
                             'NLVR2 needs "second_image", "label" and one "caption" in every row')

    def judge(images: list[AnnotatedImage]) -> list[float]:
        sentences = reasoner.pack([image.captions[0] for image in images])
        both = (one for image in track(images) for one in (image, image.second) if one is not None)
        found: list[float] = []
        for pixels in _pixel_batches(both, reasoner.model):
            pairs = pixels.unflatten(0, (-1, 2))
            here = sentences.select(torch.arange(len(found), len(found) + len(pairs)))
            found += reasoner.judge_pixels(pairs, here).tolist()
        return found

    found = ranks.share(judge, images)
    judged, labels = [probability > 0.5 for probability in found], [image.row["label"] for image in images]
    named = [image.row.get("sentence_id", image.captions[0]) for image in images]
    return PairEvaluation(judged, pair_accuracy(judged, labels), pair_consistency(judged, labels, named))


def evaluate_dialogues(ranker: DialogRanker, images: Sequence[AnnotatedImage], *,
                       caption_in: str = "attention", track: Track = iter,
                       ranks: Ranks = ALONE) -> dict[str, Any]:
    """Rank the candidate answers of every round of every row's `dialog` (VisDial). The images are divided
    among `ranks`.

    Args:
        caption_in: see `DialogRanker`.
        track: wraps the images while they are read.

    Returns:
        `rounds`, the number of rounds with candidates; the figures of `dialog_figures`; `ndcg` over the
        rounds with a relevant candidate, None if there is none; and `chance`, the recalls of a random order.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: a row has no dialogue or not exactly one caption; no round has candidates; a round lacks
            its right answer, or its number of candidates differs from other rounds'; or as in `DialogRanker`.
    """
    for image in images:
        if "dialog" not in image.row or len(image.captions) != 1:
            raise ValueError(f'{image.name} is no dialogue: '
                             'VisDial needs "dialog" and one "caption" in every row')
    asked = [(image.name, one) for image in images for one in image.row["dialog"] if one.get("candidates")]
    if not asked:
        raise ValueError("no round has candidates: there is nothing to rank")
    count = len(asked[0][1]["candidates"])
    if odd := next((name for name, one in asked
                    if "right" not in one or len(one["candidates"]) != count), None):
        raise ValueError(f'{odd} has a round without "right", '
                         f'or without {count} candidates as other rounds have')

    def score(images: list[AnnotatedImage]) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        for pixels in _pixel_batches(track(images), ranker.model):
            here = [Dialogue.from_rows(image.captions[0], image.row["dialog"])
                    for image in images[len(found) : len(found) + len(pixels)]]
            found += ranker.score_pixels(pixels, here, caption_in=caption_in)
        return found

    scores = torch.stack([one for mine in ranks.share(score, images) for one in mine])
    figures: dict[str, Any] = dialog_figures(scores, torch.tensor([one["right"] for _, one in asked]))
    relevance = torch.tensor([one.get("relevance", [0.0] * count) for _, one in asked])
    has_relevant = (relevance > 0).any(dim=1)
    chance = {f"r{k}": value for k, value in chance_recalls(torch.ones(len(asked)), count).items()}
    return {"rounds": len(asked), **figures,
            "ndcg": ndcg(scores[has_relevant], relevance[has_relevant]) if bool(has_relevant.any()) else None,
            "chance": chance}


def _pack_with_prompt(tokenizer: Tokenizer, captions: Sequence[str], prompt: str) -> PackedTexts:
    texts = [f"{prompt} {clean_caption(caption)}".strip() for caption in captions]
    return tokenizer.pack(texts, first="[DEC]", max_tokens=CAPTION_TOKENS)


def _pixel_batches(images: Iterable[StoredImage], model: BlipModel) -> Iterator[Tensor]:
    """Batches of pixels; each has an even number of images, except perhaps the last."""
    pixels = read_pixels(images, model.config.vision.image_size)
    while batch := list(islice(pixels, BATCH)):
        for read in batch:
            if isinstance(read, ImageError):  # leaving images out would make the scores misleading
                raise read
        yield torch.stack([read for read in batch if isinstance(read, Tensor)])
