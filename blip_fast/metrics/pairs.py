"""NLVR2's measures: is a sentence true of a pair of images?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def pair_accuracy(judged: Sequence[bool], labels: Sequence[bool]) -> float:
    """The share of pairs that are judged right. Raises ValueError if there is no pair or the number of labels
    differs."""
    right = _compare(judged, labels)
    return sum(right) / len(right)


def pair_consistency(judged: Sequence[bool], labels: Sequence[bool], sentences: Sequence[Hashable]) -> float:
    """The share of sentences all of whose pairs are judged right (Suhr et al. 2019).

    `sentences` names the sentence of each pair: officially its identifier without the pair's number
    (`dev-850-0-1` is sentence 1 of set 850 with the set's pair 0).

    Raises ValueError as in `pair_accuracy`, and if the number of sentences differs.
    """
    right = _compare(judged, labels)
    if len(sentences) != len(right):
        raise ValueError(f"{len(right)} pairs but {len(sentences)} sentences: name one a pair")
    wrong = {sentence for sentence, is_right in zip(sentences, right, strict=True) if not is_right}
    return 1 - len(wrong) / len(set(sentences))


def _compare(judged: Sequence[bool], labels: Sequence[bool]) -> list[bool]:
    """For each pair, whether it is judged right."""
    if not labels or len(judged) != len(labels):
        raise ValueError("one judgement a label is needed, "
                         f"got {len(judged)} judgements of {len(labels)} labels")
    return [bool(judgement) == bool(label) for judgement, label in zip(judged, labels, strict=True)]
