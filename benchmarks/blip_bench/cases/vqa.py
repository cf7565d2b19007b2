"""Ranking a list of answers, 128 in full, compared with the published loop in the same dtype: timed from
encoded questions, and from pictures and questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip_bench import words
from blip_bench.baselines import published
from blip_bench.models import SEED, load_transformers, pictures
from blip_bench.peers.installed import missing
from blip_bench.timing import Call, Case, Comparison, require
from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.model.image_kv import ImageKV
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.tasks.answer_list import LABEL_SMOOTHING, AnswerList, rank_answers
from blip_fast.tasks.answerer import Answerer

ANSWERS, SHORTLIST = 1000, 128
TARGET = 3.0  # times as fast, from encoded questions
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}  # relative error of a score
Ranked = tuple[Tensor, Tensor]  # places in the list int64 [questions, 128] and scores


def cases(directory: Path, questions: int, dtypes: Sequence[str]) -> Iterator[Case]:
    """`questions` questions, each about a random picture, with the answerer in `directory`."""
    for dtype in dtypes:
        answerer = Answerer.from_pretrained(directory, dtype=dtype, device="cpu")
        pixels = pictures(questions, answerer.model.config.vision.image_size)
        asked = equally_long(answerer.pack(words.questions(50 * questions, SEED), "[ENC]"), questions)
        choices = answerer.answer_list(words.answers(ANSWERS, SEED))
        k, check_scores = min(SHORTLIST, len(choices)), partial(check, dtype)
        question_kv = encoded(answerer, pixels, asked)
        ours = (partial(rank, answerer, question_kv, choices, k),
                partial(ranked_all, answerer, pixels, asked, choices, k))
        calls: list[dict[str, Call]] = [{f"ours {dtype}": call} for call in ours]
        if missing("transformers") is None:
            theirs = published_calls(directory, dtype, pixels, asked, choices, k)
            for each, peer in zip(calls, theirs, strict=True):
                each[f"published loop {dtype}"] = peer
        for name, each, target in zip(("from encoded questions", "from pictures"), calls,
                                      (TARGET, None), strict=True):
            comparisons = tuple(Comparison(f"ours {dtype}", peer, target) for peer in list(each)[1:])
            yield Case(f"{name}, {dtype}", each, comparisons, questions, "questions", check=check_scores)


def equally_long(texts: PackedTexts, number: int) -> PackedTexts:
    """The first `number` texts of the most common length. The decoder of transformers 5.24 ignores the mask
    of what it attends to, so it would see the padding of shorter questions, which the published code masks.
    """
    return texts.select((texts.lengths == texts.lengths.mode().values).nonzero().flatten()[:number])


def encoded(answerer: Answerer, pixels: Tensor, questions: PackedTexts) -> ImageKV:
    with evaluating(answerer.model):
        return answerer.model.question_kv(torch.cat(list(encode_images(answerer.model, pixels))), questions)


def rank(answerer: Answerer, question_kv: ImageKV, choices: AnswerList, k: int) -> Ranked:
    with evaluating(answerer.model):
        return rank_answers(answerer.model, question_kv, choices, k)


def ranked_all(answerer: Answerer, pixels: Tensor, questions: PackedTexts, choices: AnswerList,
               k: int) -> Ranked:
    return rank(answerer, encoded(answerer, pixels, questions), choices, k)


def published_calls(directory: Path, dtype: str, pixels: Tensor, asked: PackedTexts, choices: AnswerList,
                    k: int) -> tuple[Call, Call]:
    """Two calls: the ranking of encoded questions, and encoding and ranking together."""
    model = load_transformers(directory, dtype)
    model.text_decoder.label_smoothing = LABEL_SMOOTHING
    question_ids, question_mask = padded(asked)
    answers = PackedTexts.from_lists([choices.token_ids(i) for i in range(len(choices))])
    answer_ids, answer_mask = padded(answers)
    encode = partial(published.question_states, model, pixels, question_ids, question_mask)

    def ranked(states: Tensor) -> Ranked:
        return published.rank_answers(model, states, question_mask, answer_ids, answer_mask, k)

    return partial(ranked, encode()), lambda: ranked(encode())


def padded(texts: PackedTexts) -> tuple[Tensor, Tensor]:
    ids, mask = texts.to_padded(0)
    return ids, mask.long()


def check(dtype: str, results: Mapping[str, Ranked]) -> dict[str, float]:
    """Answers on both short lists must have the same scores. (Ours are sorted by score.)"""
    if (theirs := results.get(f"published loop {dtype}")) is None:
        return {}
    largest, same, compared = 0.0, [], 0
    for chosen, scores, their_chosen, their_scores in zip(*results[f"ours {dtype}"], *theirs, strict=True):
        found = dict(zip(their_chosen.tolist(), their_scores.tolist(), strict=True))
        pairs = [(score, found[answer])
                 for answer, score in zip(chosen.tolist(), scores.tolist(), strict=True)
                 if answer in found]
        largest = max([largest, *(abs(own - other) / abs(other) for own, other in pairs)])
        compared += len(pairs)
        same.append(int(chosen[0]) == int(their_chosen[their_scores.argmax()]))
    require(compared > 0, "the two short lists have no answer in common")
    require(largest < TOLERANCES[dtype], f"a score in {dtype} is {largest:.1e} off the published loop's")
    return {"scores compared": compared, "largest relative difference": largest,
            "same answer": sum(same) / len(same)}
