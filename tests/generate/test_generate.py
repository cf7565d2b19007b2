"""Generation: token for token what transformers 5 and the published code write, whatever the batch."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from generating import keys_and_values, noise, prompts_of, see, small_models
from hf_models import IMAGE_SIZE, save_model, until_sep
from reference.generate import beam_search_authors, beam_search_transformers5, greedy
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blip_fast.checkpoint import load_model
from blip_fast.generate import GenerationConfig, Request, generate, generate_stream
from blip_fast.generate.sample import draw, nucleus
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.image_kv import ImageStates
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer

SEP = 102


@pytest.fixture(scope="module")
def photograph_pixels(photographs) -> Tensor:
    rows = [json.loads(line) for line in (photographs.root / "annotations.jsonl").read_text().splitlines()]
    paths = [photographs.root / row["image"] for row in reversed(rows)][:200]
    return evaluation_transform([load_image(path) for path in paths], IMAGE_SIZE)


@pytest.fixture(scope="module")
def captioning(bert_vocabulary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioning")
    theirs = save_model("BlipForConditionalGeneration", Tokenizer.from_vocab_file(bert_vocabulary), directory,
                        sep_bias=6.0)
    return theirs, load_model(directory)[0]


@pytest.mark.parametrize(("beams", "text", "images"), [
    (1, "a picture of", 64), (1, "", 64), (3, "a picture of", 64), (3, "", 64), (2, "a picture of", 16),
    (5, "", 16)])
def test_transformers_on_photographs(captioning, photograph_pixels, bert_vocabulary, beams, text, images):
    """64 real photographs, a vocabulary of 30,524 tokens: the same token ids, of many lengths."""
    prompt = [captioning[1].config.tokens.bos, *Tokenizer.from_vocab_file(bert_vocabulary).encode(text)[1:-1]]
    written = written_as_transformers(captioning, photograph_pixels[:images], prompt, beams, max_length=20)
    assert len({len(ids) for ids in written}) >= 2
    assert len({tuple(ids) for ids in written}) > 0.75 * images


def written_as_transformers(models, pixels: Tensor, prompt: list[int], beams: int,
                            max_length: int) -> list[list[int]]:
    """Our texts of all images, after they were compared with transformers'.

    Where float32 leaves the search a choice, both are right: texts that differ must be as good as each other
    to 1e-5 by the float64 probabilities of the tokens at which they part (greedy), or as a whole (beams).
    """
    theirs, ours = models
    images, length = len(pixels), len(prompt)
    expected = theirs.generate(pixels, input_ids=torch.tensor([[*prompt, SEP]] * images), num_beams=beams,
                               max_length=max_length, min_length=min(5, max_length), do_sample=False)
    config = GenerationConfig(beams=beams, max_length=max_length, min_length=min(5, max_length))
    written = [text.token_ids for text in generate(ours, see(ours, pixels), prompts_of(prompt, images),
                                                   config)]
    pairs = [(i, ids, until_sep(row, SEP, length))
             for i, (ids, row) in enumerate(zip(written, expected, strict=True))]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    assert len(differing) <= max(1, images // 50), differing
    exact = deepcopy(theirs).double()
    for i, *both in differing:
        embeds = exact.vision_model(pixels[i : i + 1].double())[0]
        parting = next(n for n, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
        scores = []
        for ids in both:
            found = exact.text_decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=embeds)
            logits = found.logits[0, :-1]
            log_probs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            scores.append(log_probs[parting - 1] if beams == 1 else log_probs[length - 1 :].mean())
        assert abs(scores[0] - scores[1]) < 1e-5, (i, both, scores)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_transformers_on_many_photographs(photograph_pixels, bert_vocabulary, tmp_path, seed):
    """200 photographs, several models, lengths 5 to 20, with prompts and without."""
    tokenizer = Tokenizer.from_vocab_file(bert_vocabulary)
    theirs = save_model("BlipForConditionalGeneration", tokenizer, tmp_path, sep_bias=5.0 + seed, seed=seed)
    models = theirs, load_model(tmp_path)[0]
    for beams, max_length in product((1, 2, 3, 5), (5, 12, 20)):
        for text in ("", "a picture of"):
            written_as_transformers(models, photograph_pixels,
                                    [tokenizer.bos_id, *tokenizer.encode(text)[1:-1]], beams, max_length)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("small"))


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
        pixels, input_ids=torch.tensor([[*prompt, sep]] * 24), num_beams=config.beams,
        max_length=config.max_length,
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
    """Our model alone, with the [SEP] id that the textbook search expects, likely enough that texts end
    everywhere."""
    torch.manual_seed(seed)
    config = BlipConfig(VisionConfig(32, 16, 32, 1, 2), TextConfig(140, 32, 2, 2, 64),
                        SpecialTokens(sep=SEP, cls=101, bos=138, enc=139), "decoder", contrastive=False,
                        matching=False)
    model = BlipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        model.lm_head.bias[SEP] += 2.0 + seed % 3
    return model


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["transformers5", "authors"])
def test_textbook_search(seed, rule):
    """A search without cache, batches or packing, written apart from ours, finds the same texts and
    scores."""
    model, images = tiny_model(seed), 6
    seen = see(model, torch.randn(images, 3, 32, 32))
    search = {"transformers5": beam_search_transformers5, "authors": beam_search_authors}[rule]
    beams, max_length, min_length, penalty = [(2, 9, 0, 1.0), (3, 14, 4, 1.0), (4, 11, 6, 1.2)][seed % 3]
    config = GenerationConfig(beams, max_length, min_length, penalty, beam_rule=rule)
    prompt = [138, 7, 8][: 1 + seed % 3]
    written = generate(model, seen, prompts_of(prompt, images), config)
    greedily = generate(model, seen, prompts_of(prompt, images), GenerationConfig(1, max_length, min_length))
    for image in range(images):
        def next_logits(texts: Tensor, image: int = image) -> Tensor:
            packed = PackedTexts.from_lists(texts.tolist())
            logits = model.lm_logits(packed, torch.full((len(texts),), image), keys_and_values(model, seen))
            return logits[packed.offsets[1:].long() - 1]

        expected, score = search(next_logits, prompt, beams, max_length, min_length, penalty)
        assert written[image].token_ids[: len(expected)] == expected
        assert written[image].token_ids[len(expected) :] in ([], [SEP])  # the authors' list is without [SEP]
        assert written[image].score == pytest.approx(score, abs=1e-4)
        assert greedily[image].token_ids == greedy(next_logits, prompt, max_length, min_length)


def test_n_best_of_beams_are_transformers(small):
    theirs, model = small
    pixels, bos, sep = noise(12), model.config.tokens.bos, model.config.tokens.sep
    expected = theirs.generate(
        pixels, input_ids=torch.tensor([[bos, 11, sep]] * 12), num_beams=4, max_length=14,
        num_return_sequences=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    requests = [Request(kv, [bos, 11]) for kv in see(model, pixels).split()]
    found = dict(generate_stream(model, requests, GenerationConfig(beams=4, max_length=14, n_best=3), 5))
    texts = [text for i in range(12) for text in found[i]]
    assert [text.token_ids for text in texts] == [until_sep(row, sep, 2) for row in expected.sequences]
    torch.testing.assert_close(torch.tensor([text.score for text in texts]), expected.sequences_scores,
                               rtol=1e-4, atol=1e-5)


def test_samples_of_an_image(small):
    """n_best samples come likeliest first; the first that is drawn is what n_best=1 draws."""
    _, model = small
    request = Request(see(model, noise(1)), [model.config.tokens.bos], 7)
    config = GenerationConfig(top_p=0.95, temperature=1.5)
    ((_, (one,)),) = generate_stream(model, [request], config, 2)
    ((_, several),) = generate_stream(model, [request], replace(config, n_best=6), 2)
    scores = [text.score for text in several]
    assert len(several) == 6 and scores == sorted(scores, reverse=True)
    assert any(text.token_ids == one.token_ids for text in several)
    assert len({tuple(text.token_ids) for text in several}) > 3


def test_texts_that_were_cut_off(small):
    """In greedy search, texts that continue if there is more room; in any search, texts of full length
    without [SEP]."""
    _, model = small
    seen, bos, sep = see(model, noise(40)), model.config.tokens.bos, model.config.tokens.sep
    short, long = (generate(model, seen, prompts_of([bos, 11], 40), GenerationConfig(max_length=length))
                   for length in (6, 30))
    assert [text.cut for text in short] == [a.token_ids != b.token_ids
                                            for a, b in zip(short, long, strict=True)]
    assert len({text.cut for text in short}) == 2
    for options in ({"beams": 3}, {"beams": 3, "beam_rule": "authors"}, {"top_p": 0.95, "temperature": 1.5}):
        texts = generate(model, seen, prompts_of([bos, 11], 40), GenerationConfig(max_length=6, **options),
                         list(range(40)))
        assert [text.cut for text in texts] == [len(text.token_ids) == 6 and text.token_ids[-1] != sep
                                                for text in texts]
        assert any(text.cut for text in texts)


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_words_are_transformers(small, beams):
    theirs, model = small
    pixels, bos, sep = noise(24), model.config.tokens.bos, model.config.tokens.sep
    seen, config = see(model, pixels), GenerationConfig(beams=beams)
    free = generate(model, seen, prompts_of([bos, 11], 24), config)
    generated = [text.token_ids[2:] for text in free]
    counts = torch.tensor([token for ids in generated for token in ids
                           if token != sep]).bincount(minlength=120)
    pair = next(tuple(ids[:2]) for ids in generated if len(ids) > 2 and ids[0] != int(counts.argmax()))
    banned = ((int(counts.argmax()),), pair, (11, generated[0][0]), (bos, 11, generated[1][0]), (5,) * 30)
    expected = theirs.generate(pixels, input_ids=torch.tensor([[bos, 11, sep]] * 24), num_beams=beams,
                               max_length=20,
                               do_sample=False, bad_words_ids=[list(sequence) for sequence in banned])
    texts = generate(model, seen, prompts_of([bos, 11], 24), replace(config, banned=banned))
    assert [text.token_ids for text in texts] == [until_sep(row, sep, 2) for row in expected]
    assert [text.token_ids for text in texts] != [text.token_ids for text in free]


def test_nucleus_is_transformers():
    """Temperature, top-k, top-p: the same tokens with the same probabilities, and draws that follow them."""
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2
    for top_p, top_k, temperature in [(0.9, 50, 1.0), (0.5, 7, 1.0), (1.0, 3, 0.7), (0.01, 50, 1.5),
                                      (0.8, 40, 2.0)]:
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
    seen, prompts = see(model, noise(1).expand(30, -1, -1, -1)), prompts_of([model.config.tokens.bos], 30)
    config = GenerationConfig(top_p=0.95, temperature=1.5)
    texts = [w.token_ids for w in generate(model, seen, prompts, config, list(range(30)))]
    assert texts == [w.token_ids for w in generate(model, seen, prompts, config, list(range(30)))]
    assert len({tuple(text) for text in texts}) > 20


def test_no_images(small):
    _, model = small
    seen = see(model, noise(1))
    assert generate(model, ImageStates(seen.rows[:0], seen.offsets[:1]), [], GenerationConfig(beams=3)) == []
    assert list(generate_stream(model, [], GenerationConfig(beams=3), 4)) == []


@pytest.mark.parametrize(("options", "named"), [
    ({"beams": 0}, "beams"), ({"max_length": 1}, "max_length"), ({"min_length": 21}, "min_length"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"beam_rule": "mine"}, "beam_rule"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": 0.9, "beams": 2}, "top_p"),
    ({"n_best": 0}, "n_best"), ({"n_best": 4, "beams": 3}, "n_best"), ({"banned": ((),)}, "banned"),
    ({"banned": ((5, -1),)}, "banned"), ({"top_k": 0}, "top_k"), ({"temperature": 0.0}, "temperature"),
    ({"seed": -1}, "seed"),
])
def test_wrong_options(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(**options)


def test_wrong_calls(small):
    _, model = small
    seen, bos = see(model, noise(2)), model.config.tokens.bos
    with pytest.raises(ValueError, match="max_length"):
        generate(model, seen, prompts_of([bos] * 20, 2), GenerationConfig())
    with pytest.raises(ValueError, match="prompt has 0 tokens"):
        generate(model, seen, prompts_of([], 2), GenerationConfig())
    with pytest.raises(ValueError, match="slots must be at least 1"):
        list(generate_stream(model, [], GenerationConfig(), 0))
    with pytest.raises(ValueError, match="at most 64"):
        generate(model, seen, prompts_of([bos], 2), GenerationConfig(top_p=0.9, n_best=65), [1, 2])
    for banned in (5, 120), (model.config.tokens.sep,):
        with pytest.raises(ValueError, match="banned"):
            generate(model, seen, prompts_of([bos], 2), GenerationConfig(banned=(banned,)))
    with pytest.raises(ValueError, match="positions"):
        generate(model, seen, prompts_of([bos], 2), GenerationConfig(max_length=513))
    with pytest.raises(ValueError, match="prompts"):
        generate(model, seen, prompts_of([bos], 3), GenerationConfig())
    with pytest.raises(ValueError, match="seed"):
        generate(model, seen, prompts_of([bos], 2), GenerationConfig(top_p=0.9))
    with pytest.raises(ValueError, match="beams"):
        generate(model, seen, prompts_of([bos], 2), GenerationConfig(beams=60))
    model.train()
    with pytest.raises(ValueError, match="training"):
        generate(model, seen, prompts_of([bos], 2), GenerationConfig())
    model.eval()
