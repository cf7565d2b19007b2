"""The yardstick itself: the textbook models against files saved by the published code, and against
transformers."""

import pytest
import torch
import torch.nn.functional as F
from reference.generate import beam_search_transformers5
from reference.model import Sizes, TextStack, resize_positions
from reference.samples import SMALL, assert_close, published, roughened, texts
from reference.tasks import (
    DEC,
    ENC,
    Captioner,
    Matcher,
    PairReasoner,
    QuestionAnswerer,
    next_token_logits,
    targets_of,
    twin_state,
    with_first_token,
)
from reference.transformers_twin import transformers_name, transformers_twin
from torch import nn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_published_matcher():
    _, weights, expected, sizes = published("itm")
    model = Matcher(sizes)
    model.load_state_dict(weights)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    embeds = model.visual_encoder(expected["images"])
    image, text = model.image_features(embeds), model.text_features(ids, mask)
    assert_close(embeds, expected["image_embeds"])
    assert_close(image, expected["image_feat"])
    assert_close(text, expected["text_feat"])
    assert_close(image @ text.T, expected["itc_sim"])
    assert_close(model.text_encoder(ids, mask, embeds), expected["itm_hidden"])
    assert_close(model.matching_logits(embeds, ids, mask), expected["itm_logits"])
    with_enc = model.matching_logits(embeds, with_first_token(ids, ENC), mask)
    assert_close(with_enc, expected["contrast_itm_logits_with_enc"])
    for row in (0, 2):  # the same texts alone and unpadded
        alone = ids[row : row + 1, : mask[row].sum()]
        ones = torch.ones_like(alone)
        assert_close(model.text_encoder(alone, ones), expected[f"base{row}_text"])
        multimodal = model.text_encoder(with_first_token(alone, ENC), ones, embeds[row : row + 1])
        assert_close(multimodal, expected[f"base{row}_multimodal"])


@torch.no_grad()
def test_published_positions_resized():
    _, weights, expected, sizes = published("itm")
    model = Matcher(sizes)
    model.load_state_dict(weights)
    resized = resize_positions(model.visual_encoder.pos_embed, expected["pos_embed_96"].shape[1])
    assert_close(resized, expected["pos_embed_96"])
    model.visual_encoder.pos_embed = nn.Parameter(resized)
    assert_close(model.visual_encoder(expected["images_96"]), expected["image_embeds_96"])


def test_published_captioner_loss_and_gradients():
    config, weights, expected, sizes = published("caption")
    model = Captioner(sizes)
    model.load_state_dict(weights)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    logits = model.text_decoder(ids, mask, model.visual_encoder(expected["images"]))
    assert_close(logits[..., config["lm_probe_columns"]], expected["lm_logits_probe"])
    assert_close(logits.double().logsumexp(dim=-1), expected["lm_logits_lse"])
    assert torch.equal(logits.argmax(dim=-1), expected["lm_logits_argmax"])
    assert torch.equal(targets_of(ids, config["prompt_length"]), expected["decoder_targets"])

    loss = model.loss(expected["images"], ids, mask, config["prompt_length"])
    assert_close(loss, expected["loss"])
    loss.backward()
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == sorted(config["grad_param_names"])
    norms = torch.stack([parameters[name].grad.double().norm() for name in config["grad_param_names"]])
    total = expected["grad_norm_total"]
    # A key's bias shifts all scores of a softmax alike: its gradient is rounding, hence the absolute part.
    torch.testing.assert_close(norms, expected["grad_norm_params"], rtol=1e-4, atol=1e-8 * float(total))
    torch.testing.assert_close(norms.norm(), total, rtol=1e-4, atol=0)


@torch.no_grad()
def test_transformers_matcher():
    model = roughened(Matcher(SMALL))
    twin = transformers_twin("BlipForImageTextRetrieval", model, SMALL)
    images, (ids, mask) = torch.randn(3, 3, 32, 32), texts(9, 4, 12, padded_to=12)
    embeds = model.visual_encoder(images)
    itm = twin(ids, images, attention_mask=mask, use_itm_head=True)
    itc = twin(ids, images, attention_mask=mask, use_itm_head=False)
    assert_close(embeds, itm.last_hidden_state)
    assert_close(model.matching_logits(embeds, ids, mask), itm.itm_score)
    assert_close(model.image_features(embeds) @ model.text_features(ids, mask).T, itc.itm_score)


def test_transformers_captioner():
    model = roughened(Captioner(SMALL))
    twin = transformers_twin("BlipForConditionalGeneration", model, SMALL)
    images, (ids, mask) = torch.randn(3, 3, 32, 32), texts(9, 6, 12, padded_to=12)
    ids = with_first_token(ids, DEC)
    theirs = twin(images, ids, attention_mask=mask, labels=targets_of(ids, ignored=4))
    loss = model.loss(images, ids, mask, prompt_length=4)
    assert_close(loss, theirs.loss)
    loss.backward()
    theirs.loss.backward()
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[transformers_name(name)].grad, rtol=1e-4,
                                   atol=1e-6)


EQUAL_WIDTHS = Sizes(**{**vars(SMALL), "vision_width": 32, "vision_heads": 4})


def test_transformers_question_answerer():
    """transformers' decoder has the encoder's `encoder_hidden_size`, so both widths are equal here. Its
    cross-attention drops the mask that it is given (5.23), so the loss is compared on a question without
    padding."""
    model = roughened(QuestionAnswerer(EQUAL_WIDTHS))
    twin = transformers_twin("BlipForQuestionAnswering", model, EQUAL_WIDTHS)
    images, (ids, mask) = torch.randn(1, 3, 32, 32), texts(7, padded_to=7)
    answer, answer_mask = texts(5, padded_to=5)
    ids, answer = with_first_token(ids, ENC), with_first_token(answer, DEC)
    theirs = twin(ids, images, attention_mask=mask, labels=answer, decoder_attention_mask=answer_mask)
    ours = model.loss(images, ids, mask, answer, answer_mask, torch.tensor([0]), torch.tensor([1.0]))
    assert_close(ours / 4, theirs.loss)  # theirs is the mean over the 4 targets

    ids, mask = F.pad(ids, (0, 2)), F.pad(mask, (0, 2))
    generated = twin.generate(ids, images, attention_mask=mask, num_beams=3, max_length=10, min_length=1)
    with torch.no_grad():  # the states at padding are looked at too, as in the published generation
        states = model.question_states(images, ids, mask)
    text, _ = beam_search_transformers5(next_token_logits(model.text_decoder, states), [DEC], 3, 10, 1)
    assert text == generated[0].tolist()


@torch.no_grad()
def test_question_answerer_ranks_by_loss():
    model = roughened(QuestionAnswerer(SMALL))
    images, (ids, mask) = torch.randn(2, 3, 32, 32), texts(7, 5, padded_to=7)
    answers, answer_mask = texts(3, 5, 4, 3, padded_to=5)

    def score(question: int, answer: int) -> float:
        one = slice(question, question + 1)
        answer_row = answers[answer : answer + 1], answer_mask[answer : answer + 1]
        loss = model.loss(images[one], ids[one], mask[one], *answer_row, torch.tensor([0]),
                          torch.tensor([1.0]))
        return -float(loss)

    best = [max(range(4), key=lambda answer: score(question, answer)) for question in range(2)]
    assert model.rank(images, ids, mask, answers, answer_mask, shortlist=4).tolist() == best
    states = model.question_states(images, ids, mask)
    first = model.text_decoder(torch.full((2, 1), DEC), torch.ones(2, 1), states, mask)[:, 0, answers[:, 1]]
    assert model.rank(images, ids, mask, answers, answer_mask,
                      shortlist=1).tolist() == first.argmax(1).tolist()


@torch.no_grad()
def test_twin_cross_attention_of_equal_images_is_the_ordinary_one():
    sizes = Sizes(**{**vars(SMALL), "text_layers": 8})
    ordinary, twin = roughened(Matcher(sizes)), PairReasoner(sizes)
    missing, _ = twin.load_state_dict(twin_state(ordinary.state_dict()), strict=False)
    merges = {f"text_encoder.encoder.layer.{i}.crossattention.output.merge_layer" for i in (6, 7)}
    assert {key.rsplit(".", 1)[0] for key in missing} == merges | {"cls_head.0", "cls_head.2"}
    half = 0.5 * torch.eye(sizes.text_width)
    # a merge that takes the mean, as the layers below do
    for layer in twin.text_encoder.encoder["layer"][6:]:
        layer.crossattention.output.merge_layer.weight.copy_(torch.cat([half, half], dim=1))
        layer.crossattention.output.merge_layer.bias.zero_()
    images, (ids, mask) = torch.randn(3, 3, 32, 32), texts(9, 4, 12, padded_to=12)
    embeds = ordinary.visual_encoder(images)
    assert_close(twin.text_encoder(ids, mask, (embeds, embeds)), ordinary.text_encoder(ids, mask, embeds))
    logits = twin(images, images.flip(0), ids, mask)
    assert logits.shape == (3, 2)
    assert not torch.allclose(logits, twin(images.flip(0), images, ids, mask)[:, [1, 0]])


@torch.no_grad()
def test_causal_mode_sees_no_later_token():
    stack = roughened(TextStack(SMALL, SMALL.vision_width))
    ids, mask = texts(9, padded_to=9)
    changed = ids.clone()
    changed[0, 6] = 2000
    states = torch.randn(1, 5, SMALL.vision_width)
    before, after = (stack(x, mask, states, causal=True) for x in (ids, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()


@torch.no_grad()
def test_masks_are_additive():
    """Masked keys do not matter; where all keys are masked, -10,000 changes nothing (but for rounding) and
    -1e9 leaves every key alike."""
    stack = roughened(TextStack(SMALL, SMALL.vision_width))
    (ids, mask), states = texts(5, padded_to=8), torch.randn(1, 6, SMALL.vision_width)
    alone = stack(ids[:, :5], mask[:, :5], states[:, :4])
    padded = stack(ids, mask, states, torch.tensor([[1, 1, 1, 1, 0, 0]]))
    assert_close(padded[:, :5], alone)

    ones = torch.ones_like(mask)
    torch.testing.assert_close(stack(ids, 0 * ones, states), stack(ids, ones, states), rtol=0, atol=0.02)
    nothing_visible = stack(ids, mask, states, torch.zeros(1, 6))
    for layer in stack.encoder["layer"]:
        layer.crossattention.self.query.weight.zero_()
        layer.crossattention.self.query.bias.zero_()
    assert_close(nothing_visible, stack(ids, mask, states))
