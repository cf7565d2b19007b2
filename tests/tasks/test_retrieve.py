"""Retrieval scores against the published evaluation, pair by pair; recalls and losses by plain counting."""

import math
import statistics
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_fast.metrics.language import caption_loss, target_tokens, unigram_cross_entropy, unigram_entropy
from blip_fast.metrics.recall import chance_recalls, median_rank, recalls, right_ranks
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.tasks import matcher
from blip_fast.tasks import retriever as retrieve_module
from blip_fast.tasks.ranking import NOT_CANDIDATE, Ranking, RetrievalResult
from blip_fast.tasks.retriever import retrieve

CONFIG = BlipConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2),
    text=TextConfig(vocab_size=40, width=32, layers=2, heads=2, mlp_width=48, max_positions=24),
    tokens=SpecialTokens(pad=0, cls=1, sep=2, bos=38, enc=39),
    embed_dim=8,
)


@cache
def model():
    torch.manual_seed(0)
    built = BlipModel(CONFIG)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def images(count, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def texts(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return PackedTexts.from_lists(
        [[1, *torch.randint(3, 38, (n,), generator=generator).tolist(), 2] for n in lengths])


def pair_by_pair(pixels, packed, top_k, first_token=39):
    """The published evaluation: one direction after the other, with the image repeated for every pair."""
    blip = model().eval()
    rows = packed.token_ids.split(packed.lengths.tolist())
    with torch.no_grad():
        embeds = [blip.encode_images(p[None]) for p in pixels]
        vision = torch.cat([F.normalize(blip.vision_projection(e[:, 0]), dim=-1) for e in embeds])
        text = torch.cat([blip.text_features(PackedTexts.from_lists([[1, *row[1:].tolist()]]))
                          for row in rows])
        similarities = vision @ text.T

        def matched(i, j):
            one = PackedTexts.from_lists([[first_token, *rows[j][1:].tolist()]])
            return blip.match_logits(one, torch.tensor([0]), blip.stack("encoder").image_kv(embeds[i]))[0, 1]

        i2t = torch.full((len(pixels), len(rows)), -100.0)
        for i in range(len(pixels)):
            for j in similarities[i].topk(min(top_k, len(rows))).indices.tolist():
                i2t[i, j] = matched(i, j) + similarities[i, j]
        t2i = torch.full((len(rows), len(pixels)), -100.0)
        for j in range(len(rows)):
            for i in similarities[:, j].topk(min(top_k, len(pixels))).indices.tolist():
                t2i[j, i] = matched(i, j) + similarities[i, j]
    return similarities, i2t, t2i


@pytest.mark.parametrize("max_pairs, max_images, block",
                         [(512, 16, 256), (512, 2, 1), (7, 16, 2), (2, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_scores_equal_the_published_evaluation(top_k, max_pairs, max_images, block, monkeypatch):
    monkeypatch.setattr(matcher, "CPU_TEXTS", max_pairs)
    monkeypatch.setattr(matcher, "MAX_IMAGES", max_images)
    monkeypatch.setattr(retrieve_module, "BLOCK_IMAGES", block)
    pixels, packed = images(5), texts(11)
    _, i2t, t2i = pair_by_pair(pixels, packed, top_k)
    result = retrieve(model(), pixels.split(2), packed, top_k)
    for ranking, expected in ((result.image_to_text, i2t), (result.text_to_image, t2i)):
        torch.testing.assert_close(ranking.dense(), expected, atol=1e-5, rtol=1e-5)
        assert (ranking.scores.diff(dim=1) <= 0).all()  # best first
        assert ranking.items.shape == (len(expected), min(top_k, expected.shape[1]))
    assert result.pairs == int(((i2t > -100) | (t2i.T > -100)).sum())
    stream = retrieve(model(), iter(pixels.split(1)), packed, top_k, directions="text_to_image")
    torch.testing.assert_close(stream.text_to_image.dense(), t2i, atol=1e-5, rtol=1e-5)
    assert stream.image_to_text is None and stream.pairs == int((t2i > -100).sum())


def test_an_image_is_projected_once_however_many_texts_it_meets(monkeypatch):
    monkeypatch.setattr(matcher, "CPU_TEXTS", 3)
    stack, projected = model().stack("encoder"), []
    project = type(stack).image_kv
    monkeypatch.setattr(type(stack), "image_kv",
                        lambda self, embeds: projected.append(len(embeds)) or project(self, embeds))
    result = retrieve(model(), images(4), texts(10), top_k=10)
    assert sum(projected) == 4
    assert result.pairs == 40


def test_batches_of_images_and_one_tensor_give_the_same_scores():
    pixels, packed = images(7), texts(5)
    whole = retrieve(model(), pixels, packed, 3)
    parts = retrieve(model(), iter(pixels.split([1, 4, 2])), packed, 3)
    for one, other in ((parts.image_to_text, whole.image_to_text),
                       (parts.text_to_image, whole.text_to_image)):
        torch.testing.assert_close(one.dense(), other.dense(), atol=1e-5, rtol=1e-5)


def test_the_first_token_of_the_texts_does_not_matter_and_that_of_matching_is_explicit():
    pixels, packed = images(3), texts(4)
    expected = retrieve(model(), pixels, packed, 4)
    with_enc = retrieve(model(), pixels, packed.with_first(39), 4)
    torch.testing.assert_close(with_enc.image_to_text.dense(), expected.image_to_text.dense())
    with_cls = retrieve(model(), pixels, packed, 4, first_token="[CLS]").image_to_text.dense()
    torch.testing.assert_close(with_cls, pair_by_pair(pixels, packed, 4, first_token=1)[1],
                               atol=1e-5, rtol=1e-5)
    assert (with_cls - expected.image_to_text.dense()).abs().max() > 1e-3


def test_without_re_ranking_the_scores_are_the_cosines():
    pixels, packed = images(3), texts(4)
    result, cosines = retrieve(model(), pixels, packed, top_k=0), pair_by_pair(pixels, packed, 0)[0]
    assert result.pairs == 0
    torch.testing.assert_close(result.image_to_text.dense(), cosines, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(result.text_to_image.dense(), cosines.T, atol=2e-6, rtol=1e-5)


def test_dropout_is_off_and_every_module_keeps_its_mode():
    blip = model().train()
    blip.vision.eval()  # for example a frozen vision transformer
    first, second = (retrieve(blip, images(3), texts(4), 2) for _ in range(2))
    assert torch.equal(first.image_to_text.scores, second.image_to_text.scores)
    assert not first.image_to_text.scores.requires_grad
    assert blip.training and not blip.vision.training
    assert all(module.training for module in blip.text.modules())


@pytest.mark.parametrize("pixels, packed, top_k, said", [
    (images(2), texts(3), -1, "top_k is -1"),
    (images(0), texts(3), 1, "got 0 and 3"),
    (images(2), PackedTexts.from_lists([]), 1, "got 2 and 0"),
])
def test_bad_input_is_named(pixels, packed, top_k, said):
    with pytest.raises(ValueError, match=said):
        retrieve(model(), pixels, packed, top_k)


def test_another_first_token_or_direction_is_named():
    with pytest.raises(ValueError, match=r"first_token is '\[DEC\]'"):
        retrieve(model(), images(2), texts(3), 1, first_token="[DEC]")
    with pytest.raises(ValueError, match="directions is 'image_to_text'"):
        retrieve(model(), images(2), texts(3), 1, directions="image_to_text")


# ---------------------------------------------------------------- recalls


def dense_recalls(scores, right):
    return recalls(right_ranks(scores, right, right.sum(1), scores.shape[1], NOT_CANDIDATE))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), queries=st.integers(1, 6), candidates=st.integers(1, 25))
def test_ranks_equal_counting_with_the_right_one_last_among_equals(data, queries, candidates):
    """For all scores, and for the k best only, where nothing is known after the k-th score."""
    scores = torch.tensor(data.draw(st.lists(
        st.lists(st.integers(-2, 2), min_size=candidates, max_size=candidates), min_size=queries,
        max_size=queries)))
    right = torch.zeros(queries, candidates, dtype=torch.bool)
    for i in range(queries):
        right[i, data.draw(st.lists(st.integers(0, candidates - 1), min_size=1, max_size=4))] = True
    expected = []
    for row, marks in zip(scores.tolist(), right.tolist(), strict=True):
        order = sorted(range(candidates), key=lambda j: (-row[j], marks[j]))
        expected.append(next(place for place, j in enumerate(order) if marks[j]))
    for k, value in dense_recalls(scores.float(), right).items():
        assert value == pytest.approx(sum(rank < k for rank in expected) / queries)
    ranks = right_ranks(scores.float(), right, right.sum(1), candidates, NOT_CANDIDATE)
    assert median_rank(ranks) == statistics.median(expected) + 1
    k = data.draw(st.integers(1, candidates))
    best, items = scores.float().topk(k)
    ranks = right_ranks(best, right.gather(1, items), right.sum(1), candidates, best[:, -1])
    for rank, truth, row, marks in zip(ranks.tolist(), expected, scores.float(), right, strict=True):
        known = k == candidates or row[marks].max() > row.topk(k).values[-1]
        assert rank == truth if known else rank >= truth
    chosen = torch.zeros_like(right).scatter_(1, items, True)  # the published evaluation: −100 for all others
    sparse = right_ranks(best, right.gather(1, items), right.sum(1), candidates, NOT_CANDIDATE)
    dense = right_ranks(scores.float().masked_fill(~chosen, NOT_CANDIDATE), right, right.sum(1),
                        candidates, 0)
    assert sparse.tolist() == dense.tolist()


@pytest.mark.parametrize("value", [0.0, -100.0, math.nan, -math.inf])
def test_a_model_that_cannot_tell_candidates_apart_has_no_recall(value):
    right = torch.eye(30, dtype=torch.bool)
    assert dense_recalls(torch.full((30, 30), value), right) == {1: 0, 5: 0, 10: 0}


def test_one_nan_among_good_scores_is_a_miss():
    scores = torch.eye(12)
    scores[3, 5] = math.nan
    assert dense_recalls(scores, torch.eye(12, dtype=torch.bool))[1] == pytest.approx(11 / 12)


def test_chance_equals_the_mean_over_many_random_orders():
    generator = torch.Generator().manual_seed(3)
    right = torch.zeros(3, 20, dtype=torch.bool)
    right[0, :5], right[1, 7], right[2, 4:6] = True, True, True
    mean = {1: 0.0, 5: 0.0, 10: 0.0}
    for _ in range(4000):
        for k, value in dense_recalls(torch.rand(3, 20, generator=generator), right).items():
            mean[k] += value / 4000
    assert chance_recalls(right.sum(1), 20) == pytest.approx(mean, abs=0.02)
    assert chance_recalls(torch.tensor([3, 3]), 3) == {1: 1, 5: 1, 10: 1}


def ranking(scores):
    best, items = scores.sort(dim=1, descending=True)
    return Ranking(items, best, scores.shape[1], best[:, -1])


def test_several_captions_of_one_image():
    image_of_text = torch.tensor([0, 0, 1, 1])
    # found by its second text; two are ahead
    image_to_text = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.8, 0.7, 0.1, 0.2]])
    result = RetrievalResult(ranking(image_to_text), ranking(image_to_text.T), 0)
    found = result.recalls(image_of_text)
    assert found == {"i2t_r1": 0.5, "i2t_r5": 1, "i2t_r10": 1, "t2i_r1": 0.5, "t2i_r5": 1, "t2i_r10": 1}
    assert result.median_ranks(image_of_text) == {"i2t_median_rank": 2, "t2i_median_rank": 1.5}
    chances = result.chances(image_of_text)
    assert chances["i2t_r1"] == pytest.approx(0.5) and chances["t2i_r1"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="query 1 has no right candidate"):
        result.recalls(torch.tensor([0, 0, 0, 0]))
    one_way = RetrievalResult(None, result.text_to_image, 0)
    assert one_way.recalls(image_of_text) == {name: value for name, value in found.items() if name[0] == "t"}
    assert set(one_way.chances(image_of_text)) == {"t2i_r1", "t2i_r5", "t2i_r10"}
    with pytest.raises(ValueError, match="runs from 0 to 7, but there are 2 images"):
        result.recalls(torch.tensor([0, 0, 1, 7]))
    with pytest.raises(ValueError, match="names 3 images for 4 texts"):
        result.recalls(torch.tensor([0, 0, 1]))


# ---------------------------------------------------------------- captions' losses


@pytest.mark.parametrize("prompt_tokens", [1, 3])
def test_caption_loss_equals_the_mean_token_by_token(prompt_tokens, monkeypatch):
    monkeypatch.setattr("blip_fast.metrics.language.VOCABULARY_ROWS", 5)
    pixels, packed = images(3), texts(6)
    image_of_text = torch.tensor([2, 0, 2, 1, 0, 2])
    blip, losses = model().eval(), []
    with torch.no_grad():
        for row, image in zip(packed.token_ids.split(packed.lengths.tolist()), image_of_text, strict=True):
            image_kv = blip.stack("decoder").image_kv(blip.encode_images(pixels[image][None]))
            one = PackedTexts.from_lists([[38, *row[1:].tolist()]])
            logits = blip.lm_logits(one, torch.tensor([0]), image_kv).double().log_softmax(-1)
            losses += [-logits[i, row[i + 1]] for i in range(prompt_tokens - 1, len(row) - 1)]
    expected = float(torch.stack(losses).mean())
    expected = pytest.approx(expected, rel=1e-5)
    assert caption_loss(model(), pixels, packed, image_of_text, prompt_tokens) == expected
    parts = iter(pixels.split([2, 1]))
    assert caption_loss(model(), parts, packed, image_of_text, prompt_tokens) == expected


def test_caption_loss_refuses_images_that_are_not_there_and_texts_without_targets():
    with pytest.raises(ValueError, match="runs from 0 to 5, but there are 2 images"):
        caption_loss(model(), images(2), texts(2), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="no token carries a loss"):
        caption_loss(model(), images(2), texts(2), torch.tensor([0, 1]), prompt_tokens=20)
    with pytest.raises(ValueError, match="never predicted"):
        target_tokens(texts(2), prompt_tokens=0)


def test_unigram_entropies():
    train = PackedTexts.from_lists([[38, 5, 5, 6, 2], [38, 5, 2]])  # targets 5 5 6 2 5 2
    test = PackedTexts.from_lists([[38, 5, 7, 2]])
    assert unigram_entropy(test) == pytest.approx(math.log(3))
    assert unigram_entropy(train, prompt_tokens=2) == pytest.approx(  # targets 5 6 2 2
        -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5)))
    # 6 tokens + 10 of the vocabulary
    expected = -(math.log(4 / 16) + math.log(1 / 16) + math.log(3 / 16)) / 3
    assert unigram_cross_entropy(train, test, vocab_size=10) == pytest.approx(expected)
    assert unigram_cross_entropy(test, test, 10) >= unigram_entropy(test)
