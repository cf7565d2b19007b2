"""VQA by ranking: scores equal the textbook's, which pads every answer and computes it separately; each
distinct prefix is computed once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tasks
from reference.model import Sizes
from small_pretraining import make_model

from blip_fast.checkpoint.names import original_layout
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStack
from blip_fast.tasks.answer_list import AnswerList, rank_answers

LAYERS = 3
CONFIG = BlipConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=24, layers=1, heads=2),
    text=TextConfig(width=32, layers=LAYERS, heads=2, mlp_width=48, max_positions=32, dropout=0.0),
    text_stacks="untied", contrastive=False, matching=False,
)
SIZES = Sizes(image_size=32, patch_size=16, vision_width=24, vision_layers=1, vision_heads=2, positions=32,
              text_width=32, text_layers=LAYERS, text_heads=2, text_feed_forward=48)


@pytest.fixture(scope="module")
def models():
    """Ours and the textbook's with the same weights."""
    model = make_model(CONFIG).eval()
    textbook = tasks.QuestionAnswerer(SIZES)
    layout = original_layout(model.config)
    state = layout.split(model.state_dict())
    textbook.load_state_dict(state | layout.stored_twice(state))
    return model, textbook


@pytest.fixture(scope="module")
def asked(models):
    """Pixels and texts of three questions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    questions = PackedTexts.from_lists([[tasks.ENC,
                                         *torch.randint(1000, 2000, (n,), generator=generator).tolist(), 102]
                                        for n in (6, 1, 9)])
    return torch.randn(3, 3, 32, 32, generator=generator), questions


def answer_tokens(count, seed):
    """Answers of 1 to 5 words from a small vocabulary: most share beginnings, some are the beginning of
    others, and some occur twice."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    return [[tasks.DEC, *(1000 + torch.randint(4, (n,), generator=generator)).tolist(), 102] for n in lengths]


def ranked(model, asked, answers, top_k):
    pixels, questions = asked
    with torch.no_grad():
        question_kv = model.question_kv(model.encode_images(pixels), questions)
        return rank_answers(model, question_kv, AnswerList.of([str(i) for i in range(len(answers))], answers),
                            top_k)


@pytest.mark.parametrize("count, top_k", [(40, 16), (40, 3), (40, 1000), (1, 1), (7, 128)])
def test_scores_equal_the_textbook(models, asked, count, top_k):
    model, textbook = models
    answers = answer_tokens(count, seed=count)
    chosen, scores = ranked(model, asked, answers, top_k)
    assert chosen.shape == scores.shape == (3, min(top_k, count))
    pixels, questions = asked
    question_ids, question_mask = (x.long() for x in questions.to_padded(0))
    ids, mask = (x.long() for x in PackedTexts.from_lists(answers).to_padded(0))
    with torch.no_grad():
        states = textbook.question_states(pixels, question_ids, question_mask)
        for question in range(3):
            asked_one, mine = (states[question], question_mask[question]), chosen[question]
            expected = textbook.answer_scores(*asked_one, ids[mine], mask[mine])
            torch.testing.assert_close(scores[question], expected, rtol=1e-5, atol=1e-5)
            assert (scores[question].diff() <= 0).all()
            first = textbook.first_token_probabilities(*asked_one, ids)
            torch.testing.assert_close(first[mine].sort().values, first.topk(len(mine)).values.sort().values)
        if top_k >= count:
            best = textbook.rank(pixels, question_ids, question_mask, ids, mask, shortlist=count)
            assert [answers[i] for i in chosen[:, 0]] == [answers[i] for i in best]


def test_of_answers_with_one_first_token_those_that_stand_first_in_the_list_are_compared(models, asked):
    answers = [[tasks.DEC, 1000, 1001 + i, 102] for i in range(9)]
    chosen, _ = ranked(models[0], asked, answers, 4)
    assert [sorted(row) for row in chosen.tolist()] == [[0, 1, 2, 3]] * 3


def test_every_distinct_prefix_is_one_row_and_a_question_is_encoded_once(models, asked, monkeypatch):
    """The decoder computes exactly the distinct prefixes of the answers of all questions."""
    rows, encoded = [], []
    tree, forward = TextStack.decode_tree, TextStack.forward

    def counted_tree(self, token_ids, *rest):
        rows.append(len(token_ids))
        return tree(self, token_ids, *rest)

    def counted_forward(self, streams, *rest):
        encoded.extend((stream.mode, len(stream.texts.token_ids)) for stream in streams)
        return forward(self, streams, *rest)

    monkeypatch.setattr(TextStack, "decode_tree", counted_tree)
    monkeypatch.setattr(TextStack, "forward", counted_forward)
    answers = answer_tokens(60, seed=5)
    ranked(models[0], asked, answers, 1000)
    prefixes = {tuple(answer[:n]) for answer in answers for n in range(1, len(answer))}
    assert rows == [3 * len(prefixes)]
    assert len(prefixes) < sum(len(answer) - 1 for answer in answers) / 2
    # the questions, and one [DEC] for each
    assert encoded == [("encoder", len(asked[1].token_ids)), ("decoder", 3)]


def test_neighbours_do_not_change_a_question(models, asked):
    model, (pixels, questions) = models[0], asked
    answers = answer_tokens(30, seed=3)
    chosen, scores = ranked(model, asked, answers, 8)
    for i in range(3):
        alone = ranked(model, (pixels[i : i + 1], questions.select(torch.tensor([i]))), answers, 8)
        assert alone[0].tolist() == chosen[i : i + 1].tolist()
        torch.testing.assert_close(alone[1], scores[i : i + 1], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), min_size=1, max_size=12))
def test_the_list_gives_back_its_answers(words):
    answers = [[1, *word, 2] for word in words]
    found = AnswerList.of([str(word) for word in words], answers)
    assert [found.token_ids(i) for i in range(len(answers))] == answers
    assert len(found) == len(answers)
    assert len(found.tokens) == len({tuple(answer[:n]) for answer in answers
                                     for n in range(1, len(answer) + 1)})


def test_wrong_lists():
    with pytest.raises(ValueError, match="list of answers is empty"):
        AnswerList.of([], [])
    with pytest.raises(ValueError, match="the answer '  ' has no token"):
        AnswerList.of(["a", "  "], [[1, 3, 2], [1, 2]])
