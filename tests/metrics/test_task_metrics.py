"""NLVR2's and VisDial's measures, compared with values by hand and by brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_fast.metrics.dialog import dialog_figures, ndcg
from blip_fast.metrics.pairs import pair_accuracy, pair_consistency

# ---------------------------------------------------------------- NLVR2


def test_pairs_by_hand():
    """Sentence a: both pairs right; b: one of two wrong; c: its only pair right."""
    judged, labels = [True, False, True, True, False], [True, False, True, False, False]
    assert pair_accuracy(judged, labels) == 0.8
    assert pair_consistency(judged, labels, ["a", "a", "b", "b", "c"]) == pytest.approx(2 / 3)
    assert pair_consistency(judged, labels, ["a", "b", "a", "b", "c"]) == pytest.approx(2 / 3)
    assert pair_consistency(judged, labels, range(5)) == pair_accuracy(judged, labels)
    assert pair_accuracy(labels, labels) == pair_consistency(labels, labels, "aabbc") == 1


def test_pairs_that_cannot_be_counted():
    for judged, labels in (([], []), ([True], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="one judgement a label"):
            pair_accuracy(judged, labels)
    with pytest.raises(ValueError, match="2 pairs but 1 sentences"):
        pair_consistency([True, True], [True, True], ["a"])


# ---------------------------------------------------------------- VisDial


def test_dialog_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.0], [0.9, 0.1, 0.5, 0.0], [0.3, 0.3, 0.3, 0.3]])
    found = dialog_figures(scores, torch.tensor([0, 1, 2]))  # ranks 1, 3 and, all tied, 4
    assert found == pytest.approx({"mrr": (1 + 1 / 3 + 1 / 4) / 3, "r1": 1 / 3, "r5": 1, "r10": 1,
                                   "mean_rank": 8 / 3})


def test_ndcg_by_hand():
    """Two relevant candidates: the first two places count. The best order is 1, 0.5."""
    best = 1 + 0.5 / math.log2(3)
    relevance = torch.tensor([[0.5, 0.0, 1.0, 0.0]])
    assert ndcg(torch.tensor([[2.0, 1.0, 3.0, 0.0]]), relevance) == pytest.approx(1)
    assert ndcg(torch.tensor([[3.0, 1.0, 2.0, 0.0]]),
                relevance) == pytest.approx((0.5 + 1 / math.log2(3)) / best)
    assert ndcg(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), relevance) == pytest.approx(1 / math.log2(3) / best)
    assert ndcg(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), relevance) == 0
    assert ndcg(torch.zeros(1, 4), relevance) == 0  # all tied: the irrelevant ones first
    assert ndcg(torch.ones(1, 4), torch.tensor([[0.5, 1, 1, 0.5]])) == pytest.approx(
        (0.5 + 0.5 / math.log2(3) + 1 / 2 + 1 / math.log2(5))
        / (1 + 1 / math.log2(3) + 0.5 / 2 + 0.5 / math.log2(5)))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), rounds=st.integers(1, 5), candidates=st.integers(1, 14))
def test_dialog_by_sorting_with_what_is_wrong_first_among_equals(data, rounds, candidates):
    def table(values):
        return data.draw(st.lists(st.lists(values, min_size=candidates, max_size=candidates), min_size=rounds,
                                  max_size=rounds))

    scores, right = (table(st.integers(-2, 2)),
                     data.draw(st.lists(st.integers(0, candidates - 1), min_size=rounds, max_size=rounds)))
    ranks = [1 + sorted(range(candidates), key=lambda j: (-row[j], j == at)).index(at)
             for row, at in zip(scores, right, strict=True)]
    found = dialog_figures(torch.tensor(scores).float(), torch.tensor(right))
    expected = {"mrr": sum(1 / rank for rank in ranks) / rounds, "mean_rank": sum(ranks) / rounds}
    expected |= {f"r{k}": sum(rank <= k for rank in ranks) / rounds for k in (1, 5, 10)}
    assert found == pytest.approx(expected)

    relevance = table(st.sampled_from([0, 0.25, 1]))
    for row, at in zip(relevance, right, strict=True):
        row[at] = 1  # every round has a relevant candidate
    gains = []
    for row, scored in zip(relevance, scores, strict=True):
        dcg = [sum(row[j] / math.log2(place + 2) for place, j in enumerate(order[: sum(r > 0 for r in row)]))
               for order in (sorted(range(candidates), key=lambda j: (-scored[j], row[j])),
                             sorted(range(candidates), key=lambda j: -row[j]))]
        gains.append(dcg[0] / dcg[1])
    assert ndcg(torch.tensor(scores).float(), torch.tensor(relevance)) == pytest.approx(sum(gains) / rounds)


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_a_model_that_cannot_tell_answers_apart_gains_nothing(value):
    scores, right = torch.full((3, 100), value), torch.tensor([0, 50, 99])
    relevance = torch.zeros(3, 100)
    relevance[:, 7] = 1
    assert dialog_figures(scores, right) == {"mrr": pytest.approx(0.01), "r1": 0, "r5": 0, "r10": 0,
                                             "mean_rank": 100}
    assert ndcg(scores, relevance) == 0


def test_dialogues_that_cannot_be_measured():
    with pytest.raises(ValueError, match="one round at least"):
        dialog_figures(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3,\)"):
        dialog_figures(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="right runs from 0 to 4, but there are 4 candidates"):
        dialog_figures(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(2, 3\)"):
        ndcg(torch.zeros(2, 4), torch.zeros(2, 3))
    for bad in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="round 1 has no relevant candidate or a negative relevance"):
            ndcg(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], bad]))
