"""NLVR2's measures: is a sentence true of a pair of images?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def pair_accuracy(judged: Sequence[bool], labels: Sequence[bool]) -> float:
    """Share of pairs that are judged right. Raises ValueError without pairs or with another number of labels."""
    right = _right(judged, labels)
    return sum(right) / len(right)


def pair_consistency(judged: Sequence[bool], labels: Sequence[bool], sentences: Sequence[Hashable]) -> float:
    """Share of sentences of which every pair is judged right (Suhr et al. 2019).

    `sentences` names the sentence of each pair: officially its identifier without the pair's number (`dev-850-0-1` is
    sentence 1 of set 850 with the set's pair 0).

    Raises ValueError as `pair_accuracy`, and where not every pair names a sentence.
    """
    right = _right(judged, labels)
    if len(sentences) != len(right):
        raise ValueError(f"{len(right)} pairs but {len(sentences)} sentences: name one a pair")
    wrong = {sentence for sentence, is_right in zip(sentences, right, strict=True) if not is_right}
    return 1 - len(wrong) / len(set(sentences))


def _right(judged: Sequence[bool], labels: Sequence[bool]) -> list[bool]:
    if not labels or len(judged) != len(labels):
        raise ValueError(f"one judgement a label is needed, got {len(judged)} judgements of {len(labels)} labels")
    return [bool(judgement) == bool(label) for judgement, label in zip(judged, labels, strict=True)]
