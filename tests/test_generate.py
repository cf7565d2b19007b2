"""Generation: token for token what transformers 5 and the published code write, whatever the batch."""

import json

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer, until_sep
from reference.generate import beam_search_authors, beam_search_transformers5, greedy
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blip_fast.checkpoint import load_model
from blip_fast.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.generate import GenerationConfig, generate
from blip_fast.generate.sample import draw, nucleus
from blip_fast.images import evaluation_transform, load_image
from blip_fast.model import BlipModel
from blip_fast.packing import PackedTexts
from blip_fast.text import ImageKV, TextStack
from blip_fast.tokenizer import Tokenizer

SEP = 102


def see(model: BlipModel, pixels: Tensor) -> ImageKV:
    with torch.no_grad():
        return model.stack("decoder").image_kv(model.encode_images(pixels))


def prompts_of(prompt: list[int], images: int) -> list[list[int]]:
    return [prompt] * images


@pytest.fixture(scope="module")
def photograph_pixels(photographs) -> Tensor:
    rows = [json.loads(line) for line in (photographs.root / "annotations.jsonl").read_text().splitlines()]
    paths = [photographs.root / row["image"] for row in rows if row["split"] == "test"][:64]
    return evaluation_transform([load_image(path) for path in paths], IMAGE_SIZE)


@pytest.fixture(scope="module")
def captioning(bert_vocabulary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioning")
    theirs = save_model("BlipForConditionalGeneration", Tokenizer.from_vocab_file(bert_vocabulary), directory,
                        sep_bias=6.0)
    return theirs, load_model(directory)[0]


@pytest.mark.parametrize(("beams", "text", "images"), [
    (1, "a picture of", 64), (1, "", 64), (3, "a picture of", 64), (3, "", 64), (2, "a picture of", 16), (5, "", 16)])
def test_transformers_on_photographs(captioning, photograph_pixels, bert_vocabulary, beams, text, images):
    """64 real photographs, a vocabulary of 30,524 tokens: the same token ids, of many lengths."""
    theirs, ours = captioning
    pixels = photograph_pixels[:images]
    prompt = [ours.config.tokens.bos, *Tokenizer.from_vocab_file(bert_vocabulary).encode(text)[1:-1]]
    expected = theirs.generate(pixels, input_ids=torch.tensor([[*prompt, SEP]] * images), num_beams=beams,
                               max_length=20, min_length=5, do_sample=False)
    written = generate(ours, see(ours, pixels), prompts_of(prompt, images),
                       GenerationConfig(beams=beams, max_length=20, min_length=5))
    assert [w.token_ids for w in written] == [until_sep(row, SEP, len(prompt)) for row in expected]
    assert len({len(w.token_ids) for w in written}) >= 2
    assert len({tuple(w.token_ids) for w in written}) > 0.75 * images


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    theirs = save_model("BlipForConditionalGeneration", small_tokenizer(), directory, sep_bias=4.0, seed=2)
    return theirs, load_model(directory)[0]


def noise(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


OPTIONS = {
    "long": {"beams": 3, "max_length": 30},
    "longer_preferred": {"beams": 4, "length_penalty": 2.0},
    "shorter_preferred": {"beams": 3, "length_penalty": -1.0},
    "sums": {"beams": 3, "length_penalty": 0.0},
    "no_repetition": {"beams": 3, "repetition_penalty": 1.5},
    "repetition": {"beams": 2, "repetition_penalty": 0.8},
    "one_token": {"beams": 3, "max_length": 5},
    "full_length": {"beams": 3, "min_length": 12, "max_length": 12},
    "greedy_no_repetition": {"beams": 1, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transformers_options(small, options):
    """Every option means what it means there, and beam scores agree."""
    theirs, ours = small
    pixels, sep = noise(24), ours.config.tokens.sep
    prompt = [ours.config.tokens.bos, 11, 12, 13]
    config = GenerationConfig(**options)
    expected = theirs.generate(
        pixels, input_ids=torch.tensor([[*prompt, sep]] * 24), num_beams=config.beams, max_length=config.max_length,
        min_length=config.min_length, length_penalty=config.length_penalty, do_sample=False,
        repetition_penalty=config.repetition_penalty, return_dict_in_generate=True, output_scores=True)
    written = generate(ours, see(ours, pixels), prompts_of(prompt, 24), config)
    assert [w.token_ids for w in written] == [until_sep(row, sep, 4) for row in expected.sequences]
    if config.beams > 1:
        scores = torch.tensor([w.score for w in written])
        torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


PUBLISHED = {
    "greedy": {"max_length": 20, "min_length": 5},
    "beam3": {"beams": 3, "max_length": 20, "min_length": 5},
    "beam3_rep": {"beams": 3, "max_length": 20, "min_length": 5, "repetition_penalty": 1.1},
    "beam5_min10": {"beams": 5, "max_length": 30, "min_length": 10},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_code(data_root, name):
    """Token ids and scores that the published code itself wrote, under its beam rule."""
    model, _ = load_model(data_root / "original_blip" / "caption.pth")
    with np.load(data_root / "original_blip" / "caption_io.npz") as arrays:
        images, ids = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays[f"gen_{name}_ids"])
        scores = arrays[f"gen_{name}_scores"] if name != "greedy" else None
    prompt = [30522, 1037, 3861, 1997]  # [DEC] a picture of
    written = generate(model, see(model, images), prompts_of(prompt, 3),
                       GenerationConfig(beam_rule="authors", **PUBLISHED[name]))
    assert [w.token_ids for w in written] == [until_sep(row, SEP, 4) for row in ids]
    if scores is not None:
        np.testing.assert_allclose([w.score for w in written], scores, rtol=0, atol=2e-5)


def tiny_model(seed: int) -> BlipModel:
    """Ours alone, with [SEP] as the textbook search expects it and so likely that texts end everywhere."""
    torch.manual_seed(seed)
    config = BlipConfig(VisionConfig(32, 16, 32, 1, 2), TextConfig(140, 32, 2, 2, 64),
                        SpecialTokens(sep=SEP, cls=101, bos=138, enc=139), "decoder", contrastive=False, matching=False)
    model = BlipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        model.lm_head.bias[SEP] += 2.0 + seed % 3
    return model


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["transformers5", "authors"])
def test_textbook_search(seed, rule):
    """A search without cache, batches or packing, written apart from ours, finds the same texts and scores."""
    model, images = tiny_model(seed), 6
    image_kv = see(model, torch.randn(images, 3, 32, 32))
    search = {"transformers5": beam_search_transformers5, "authors": beam_search_authors}[rule]
    beams, max_length, min_length, penalty = [(2, 9, 0, 1.0), (3, 14, 4, 1.0), (4, 11, 6, 1.2)][seed % 3]
    config = GenerationConfig(beams, max_length, min_length, penalty, beam_rule=rule)
    prompt = [138, 7, 8][: 1 + seed % 3]
    written = generate(model, image_kv, prompts_of(prompt, images), config)
    greedily = generate(model, image_kv, prompts_of(prompt, images), GenerationConfig(1, max_length, min_length))
    for image in range(images):
        def next_logits(texts: Tensor, image: int = image) -> Tensor:
            packed = PackedTexts.from_lists(texts.tolist())
            logits = model.lm_logits(packed, torch.full((len(texts),), image), image_kv)
            return logits[packed.offsets[1:].long() - 1]

        expected, score = search(next_logits, prompt, beams, max_length, min_length, penalty)
        assert written[image].token_ids[: len(expected)] == expected
        assert written[image].token_ids[len(expected) :] in ([], [SEP])  # the authors' list is without [SEP]
        assert written[image].score == pytest.approx(score, abs=1e-4)
        assert greedily[image].token_ids == greedy(next_logits, prompt, max_length, min_length)


SEARCHES = {"greedy": GenerationConfig(), "beams": GenerationConfig(beams=3),
            "authors": GenerationConfig(beams=3, beam_rule="authors"), "nucleus": GenerationConfig(top_p=0.9)}


@pytest.mark.parametrize("config", SEARCHES.values(), ids=SEARCHES)
def test_batch_does_not_matter(small, config):
    """An image's text is the same alone, among others that end sooner or later, and in another order."""
    _, model = small
    pixels, bos, seeds = noise(20, seed=3), model.config.tokens.bos, list(range(100, 120))

    def written(which: list[int]) -> dict[int, list[int]]:
        texts = generate(model, see(model, pixels[which]), prompts_of([bos], len(which)), config,
                         [seeds[i] for i in which])
        return {i: text.token_ids for i, text in zip(which, texts, strict=True)}

    together = written(list(range(20)))
    assert len({len(ids) for ids in together.values()}) > 2
    assert together == written([7, 19, 0, *range(1, 7), *range(8, 19)])
    assert together == {i: ids for i in range(20) for ids in written([i]).values()}


def test_beams_share_one_image(small, monkeypatch):
    """No beam copies an image's keys and values, and images whose texts are done leave the batch."""
    _, model = small
    rows, decode = [], TextStack.decode
    monkeypatch.setattr(TextStack, "decode", lambda self, ids, cache, image_kv: (
        rows.append((len(ids), len(image_kv.kv[0]))), decode(self, ids, cache, image_kv))[1])
    generate(model, see(model, noise(20, seed=3)), prompts_of([model.config.tokens.bos], 20), GenerationConfig(beams=4))
    tokens = model.config.vision.tokens
    assert rows[0] == (20, 20 * tokens)
    assert all(texts * tokens == 4 * image_rows for texts, image_rows in rows[1:])
    assert rows[1][1] == 20 * tokens and rows[-1][1] < 20 * tokens


def test_nucleus_is_transformers():
    """Temperature, top-k, top-p: the same tokens with the same probabilities, and draws that follow them."""
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2
    for top_p, top_k, temperature in [(0.9, 50, 1.0), (0.5, 7, 1.0), (1.0, 3, 0.7), (0.01, 50, 1.5), (0.8, 40, 2.0)]:
        config = GenerationConfig(top_p=top_p, top_k=top_k, temperature=temperature)
        warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k),
                                    TopPLogitsWarper(top_p)])
        expected = warp(torch.zeros(5, 1, dtype=torch.long), scores).softmax(-1)
        probs, tokens = nucleus(scores, config)
        ours = torch.zeros_like(scores).scatter(1, tokens, probs / probs.sum(-1, keepdim=True))
        torch.testing.assert_close(ours, expected)
        steps = 1000
        uniforms = (torch.arange(steps) + 0.5) / steps
        drawn = draw(scores[:1].expand(steps, -1), uniforms, config)
        frequencies = drawn.bincount(minlength=40) / steps
        torch.testing.assert_close(frequencies, expected[0], atol=2 / steps, rtol=0)


def test_seeds(small):
    """The same seed gives the same text, other seeds others."""
    _, model = small
    image_kv, prompts = see(model, noise(1).expand(30, -1, -1, -1)), prompts_of([model.config.tokens.bos], 30)
    config = GenerationConfig(top_p=0.95, temperature=1.5)
    texts = [w.token_ids for w in generate(model, image_kv, prompts, config, list(range(30)))]
    assert texts == [w.token_ids for w in generate(model, image_kv, prompts, config, list(range(30)))]
    assert len({tuple(text) for text in texts}) > 20


def test_bfloat16(small):
    """Low precision runs every search and writes whole texts."""
    _, model = small
    low = BlipModel(model.config).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    for config in SEARCHES.values():
        for text in generate(low, see(low, noise(3).bfloat16()), prompts_of([model.config.tokens.bos], 3), config,
                             [1, 2, 3]):
            assert 2 <= len(text.token_ids) <= config.max_length and text.score < 0


def test_no_images(small):
    _, model = small
    assert generate(model, see(model, noise(1)).select(torch.arange(0)), [],
                    GenerationConfig(beams=3)) == []


@pytest.mark.parametrize(("options", "named"), [
    ({"beams": 0}, "beams"), ({"max_length": 1}, "max_length"), ({"min_length": 21}, "min_length"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"beam_rule": "mine"}, "beam_rule"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": 0.9, "beams": 2}, "top_p"),
    ({"top_k": 0}, "top_k"), ({"temperature": 0.0}, "temperature"), ({"seed": -1}, "seed"),
])
def test_wrong_options(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(**options)


def test_wrong_calls(small):
    _, model = small
    image_kv, bos = see(model, noise(2)), model.config.tokens.bos
    with pytest.raises(ValueError, match="max_length"):
        generate(model, image_kv, prompts_of([bos] * 20, 2), GenerationConfig())
    with pytest.raises(ValueError, match="positions"):
        generate(model, image_kv, prompts_of([bos], 2), GenerationConfig(max_length=513))
    with pytest.raises(ValueError, match="prompts"):
        generate(model, image_kv, prompts_of([bos], 3), GenerationConfig())
    with pytest.raises(ValueError, match="seed"):
        generate(model, image_kv, prompts_of([bos], 2), GenerationConfig(top_p=0.9))
    with pytest.raises(ValueError, match="beams"):
        generate(model, image_kv, prompts_of([bos], 2), GenerationConfig(beams=60))
    model.train()
    with pytest.raises(ValueError, match="training"):
        generate(model, image_kv, prompts_of([bos], 2), GenerationConfig())
    model.eval()
