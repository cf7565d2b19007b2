"""Greedy and beam search for one text at a time, recomputing everything at every step.

`next_logits` maps n unfinished texts [n, L] to their next token's logits [n, V]. `max_length` and `min_length` count
the prompt. Both beam searches keep, from the best 2 x beams continuations, the best `beams` unfinished ones, and
finish those that end in [SEP] among the best `beams`; they differ in how a finished text is scored and in when to stop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NextLogits = Callable[[Tensor], Tensor]
SEP = 102


def adjust(scores: Tensor, texts: Tensor, min_length: int, repetition_penalty: float) -> Tensor:
    """Scores [n, V] with tokens that already occur made less likely, and [SEP] impossible before `min_length`."""
    seen = scores.gather(1, texts)
    seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    scores = scores.scatter(1, texts, seen)
    if texts.shape[1] < min_length:
        scores[:, SEP] = -torch.inf
    return scores


@torch.no_grad()
def greedy(
    next_logits: NextLogits, prompt: list[int], max_length: int, min_length: int, repetition_penalty: float = 1.0
) -> list[int]:
    """The likeliest next token until [SEP] (included) or `max_length`."""
    text = list(prompt)
    while len(text) < max_length and text[-1] != SEP:
        texts = torch.tensor([text])
        text.append(int(adjust(next_logits(texts), texts, min_length, repetition_penalty).argmax()))
    return text


def continuations(
    next_logits: NextLogits,
    running: list[tuple[float, list[int]]],
    beams: int,
    min_length: int,
    repetition_penalty: float,
) -> list[tuple[float, list[int]]]:
    """The best 2 x beams of all one-token continuations: (summed log-probability, text), best first."""
    texts = torch.tensor([text for _, text in running])
    log_probs = adjust(next_logits(texts).log_softmax(dim=-1), texts, min_length, repetition_penalty)
    sums = torch.tensor([[score] for score, _ in running]) + log_probs  # [beams, V]
    best = sums.flatten().topk(2 * beams)
    return [
        (score, [*running[index // sums.shape[1]][1], index % sums.shape[1]])
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def beam_search_authors(
    next_logits: NextLogits,
    prompt: list[int],
    beams: int,
    max_length: int,
    min_length: int,
    repetition_penalty: float = 1.0,
) -> tuple[list[int], float]:
    """The rule of transformers 4.15, which the published code runs on: returns (text, score).

    Score: summed log-probability / length, the prompt counted and [SEP] not. Stops when `beams` texts are finished
    and the worst is at least as good as the best continuation would be at the present length.
    """
    running, finished = [(0.0, list(prompt))], []
    while len(running[0][1]) < max_length:
        length = len(running[0][1])
        ranked = continuations(next_logits, running, beams, min_length, repetition_penalty)
        ended = [(total / length, text) for total, text in ranked[:beams] if text[-1] == SEP]
        finished = sorted(finished + ended, key=lambda item: item[0], reverse=True)[:beams]
        running = [item for item in ranked if item[1][-1] != SEP][:beams]
        if len(finished) == beams and finished[-1][0] >= ranked[0][0] / length:
            break
    else:
        finished += [(total / max_length, text) for total, text in running]
    score, text = max(finished, key=lambda item: item[0])
    return text, score


@torch.no_grad()
def beam_search_transformers5(
    next_logits: NextLogits,
    prompt: list[int],
    beams: int,
    max_length: int,
    min_length: int,
    repetition_penalty: float = 1.0,
) -> tuple[list[int], float]:
    """The rule of transformers 5: returns (text, score).

    Score: summed log-probability / generated tokens, [SEP] counted. Stops when `beams` texts are finished and the
    best running one, at its present length, is no better than the worst of them. At `max_length` only the best
    `beams` continuations are finished.
    """
    running, finished = [(0.0, list(prompt))], []
    while True:
        ranked = continuations(next_logits, running, beams, min_length, repetition_penalty)
        generated = len(ranked[0][1]) - len(prompt)
        full = len(ranked[0][1]) == max_length
        ended = [(total / generated, text) for total, text in ranked[:beams] if full or text[-1] == SEP]
        finished = sorted(finished + ended, key=lambda item: item[0], reverse=True)[:beams]
        running = [item for item in ranked if item[1][-1] != SEP][:beams]
        if full or (len(finished) == beams and running[0][0] / generated <= finished[-1][0]):
            break
    score, text = finished[0]
    return text, score
