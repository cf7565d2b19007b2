"""LM heads whose projection is not the word embeddings: read, computed, trained, written, in all three
forms."""

import dataclasses
from pathlib import Path

import published
import pytest
import safetensors.torch
import torch
import transformers
from blip_train.prepare import prepare_model
from blip_train.recipe import Recipe
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from hf_models import save_model, small_tokenizer
from published import assert_same, convert, weights
from torch import nn

from blip_fast.checkpoint import load_model, save_original
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer

HEAD = "text_decoder.cls.predictions.decoder.weight"
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
TEXTS = [[38, 5, 6, 7, 2], [38, 2], [38, 9, 30, 2]]


def textbook(kind: str) -> nn.Module:
    """The kind's textbook model with an LM head that has a weight of its own."""
    model = published.make(kind).eval()
    projection = model.text_decoder.cls["predictions"].decoder
    torch.manual_seed(5)
    projection.weight = nn.Parameter(torch.randn_like(projection.weight))
    return model


def save_original_kind(kind: str, path: Path) -> Path:
    return published.save(textbook(kind).state_dict(), path)


@pytest.mark.parametrize("kind", ["pretraining", "captioning", "answering"])
def test_round_trips(kind, tmp_path):
    path = save_original_kind(kind, tmp_path / "theirs.pth")
    native = convert(path, "native", tmp_path / "native")
    assert load_model(native)[0].config.tied_lm_head is False
    assert_same(published.read(convert(native, "original", tmp_path / "ours.pth")), published.read(path))


@torch.no_grad()
def test_logits_equal_the_textbook(tmp_path):
    theirs = textbook("pretraining")
    ours, _ = load_model(save_original_kind("pretraining", tmp_path / "x.pth"))
    texts, images = PackedTexts.from_lists(TEXTS), torch.randn(3, 3, 24, 24)
    image_embeds = ours.encode_images(images)
    logits = ours.lm_logits(texts, torch.arange(3), ours.stack("decoder").image_kv(image_embeds))
    ids, mask = texts.to_padded(0)
    expected = theirs.text_decoder(ids, mask.long(), theirs.visual_encoder(images))[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_number_apart_is_untied(tmp_path):
    state = published.make("captioning").state_dict()
    tied, _ = load_model(published.save(state, tmp_path / "x.pth"))
    assert tied.config.tied_lm_head and tied.lm_head.projection is None
    state[HEAD] = state[HEAD].clone()
    state[HEAD][3, 4] += 1e-6
    untied, _ = load_model(published.save(state, tmp_path / "x.pth"))
    assert torch.equal(untied.lm_head.projection.weight, state[HEAD])
    assert torch.equal(untied.stack("decoder").word_embeds.weight, state[WORDS])


def test_a_misshapen_projection_is_named(tmp_path):
    state = published.make("captioning").state_dict() | {HEAD: torch.zeros(39, 16)}
    with pytest.raises(ValueError, match=rf"misshapen: {HEAD} \[39, 16\] instead of \[40, 16\]"):
        load_model(published.save(state, tmp_path / "x.pth"))


def test_parts_keep_it(tmp_path):
    model, _ = load_model(save_original_kind("pretraining", tmp_path / "x.pth"))
    parts = {"text_stacks": "decoder", "contrastive": False, "matching": False}
    captioner = model.restricted_to(dataclasses.replace(model.config, **parts))
    assert torch.equal(captioner.lm_head.projection.weight, model.lm_head.projection.weight)
    matcher = model.restricted_to(dataclasses.replace(model.config, text_stacks="encoder"))
    assert matcher.lm_head is None
    with pytest.raises(ValueError, match="this model's tied_lm_head is False: a part of it keeps that"):
        model.restricted_to(dataclasses.replace(model.config, **parts, tied_lm_head=True))


def test_training_from_it_trains_it(tmp_path):
    """`tied_lm_head` comes from the checkpoint, like sizes, and not from the recipe."""
    path = save_original_kind("pretraining", tmp_path / "x.pth")
    recipe = Recipe(init=str(path), model=BlipConfig(vision=VisionConfig(image_size=24, patch_size=8)))
    model = prepare_model(recipe, Tokenizer([*BERT_TOKENS, *"abcdefg"]))
    batch = Batch(torch.randn(3, 3, 24, 24), PackedTexts.from_lists(TEXTS), torch.arange(3))
    Pretraining(model, Objective(losses=("lm",)), seed=0)(batch, StepContext()).total.backward()
    assert model.lm_head.projection.weight.grad.abs().sum() > 0
    assert torch.equal(model.lm_head.projection.weight, published.read(path)[HEAD])


def test_fresh_projection_is_initialised():
    """It keeps its input's size, as every other weight does."""
    config = BlipConfig(vision=VisionConfig(image_size=16, width=16, layers=1, heads=1),
                        text=TextConfig(vocab_size=40, width=16, layers=1, heads=1, mlp_width=16,
                                        max_positions=9),
                        tokens=SpecialTokens(**published.SPECIAL_TOKENS), tied_lm_head=False)
    weight = BlipModel(config).lm_head.projection.weight.detach()
    assert weight.std() == pytest.approx(16**-0.5, rel=0.2)


# ------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def fine_tuned(tmp_path) -> Path:
    """As transformers of 2023 saved a fine-tuned captioner: untied weights, and a config.json that says
    tied."""
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path / "hf")
    tensors = weights(tmp_path / "hf")
    tensors[HEAD] = tensors[WORDS] + 0.1 * torch.randn(tensors[WORDS].shape)
    safetensors.torch.save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "hf"


@torch.no_grad()
def logits_of_both(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = transformers.BlipForConditionalGeneration.from_pretrained(directory).eval()
    ours, _ = load_model(directory)
    texts, pixels = PackedTexts.from_lists([[5, 6, 7, 8]]), torch.randn(1, 3, 64, 64)
    embeds = ours.encode_images(pixels)
    logits = ours.lm_logits(texts, torch.tensor([0]), ours.stack("decoder").image_kv(embeds))
    return logits, theirs.text_decoder(torch.tensor([[5, 6, 7, 8]]), encoder_hidden_states=embeds).logits[0]


def test_transformers_and_we_read_it_alike_and_back(fine_tuned, tmp_path):
    torch.testing.assert_close(*logits_of_both(fine_tuned), rtol=1e-4, atol=1e-4)
    model, tokenizer = load_model(fine_tuned)
    assert torch.equal(model.lm_head.projection.weight, weights(fine_tuned)[HEAD])
    save_original(model, tokenizer, tmp_path / "x.pth")
    again = convert(tmp_path / "x.pth", "hf", tmp_path / "again")
    for name in (HEAD, WORDS):
        assert torch.equal(weights(again)[name], weights(fine_tuned)[name])
    torch.testing.assert_close(*logits_of_both(again), rtol=1e-4, atol=1e-4)
    loaded = transformers.BlipForConditionalGeneration.from_pretrained(again)
    assert loaded.config.tie_word_embeddings is loaded.config.text_config.tie_word_embeddings is False
    # Training in transformers gives two biases; it computes with the projection's.
    nn.init.normal_(loaded.text_decoder.cls.predictions.decoder.bias)
    loaded.save_pretrained(again)
    torch.testing.assert_close(*logits_of_both(again), rtol=1e-4, atol=1e-4)
