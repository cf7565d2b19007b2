"""CapFilt compared with captions and scores made one at a time; the filter's quality compared with plain
counting."""

import json
from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from blip_fast.capfilt import (
    CapFiltConfig,
    CapFiltResult,
    CapFiltRow,
    WebBatch,
    WebImage,
    calibration,
    capfilt,
    capfilt_stream,
    filter_quality,
)
from blip_fast.capfilt.clean import NUCLEUS
from blip_fast.capfilt.quality import calibrated_threshold
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.generate import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.scenes.scenes import write_scenes
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher

WORDS = ["a", "picture", "of", "red", "green", "blue", "circle", "square", "ring", "cross", "on", "grey",
         "left"]
TOKENIZER = Tokenizer([*BERT_TOKENS, *WORDS])
CAPTIONS = [["A red circle!"], [], ["a blue ring on grey", "a green cross"], ["a red square", ""], ["a"]]


@cache
def model(seed, image_size=16):
    torch.manual_seed(seed)
    tokens = SpecialTokens(TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.bos_id,
                           TOKENIZER.enc_id)
    built = BlipModel(BlipConfig(
        vision=VisionConfig(image_size=image_size, patch_size=8, width=32, layers=1, heads=2),
        text=TextConfig(vocab_size=TOKENIZER.vocab_size, width=32, layers=2, heads=2, mlp_width=48,
                        max_positions=40),
        tokens=tokens, embed_dim=8))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def web_batch(captions=CAPTIONS):
    pixels = torch.randn(len(CAPTIONS), 3, 16, 16,
                         generator=torch.Generator().manual_seed(5))[: len(captions)]
    return WebBatch([f"image{i}" for i in range(len(captions))], pixels, captions)


def run(captioner, matcher, batches, *config):
    return capfilt(Captioner(captioner, TOKENIZER), Matcher(matcher, TOKENIZER), batches, *config)


def one_by_one(captioner, matcher, batch, config):
    """Every caption and every score computed alone, with its own image."""
    captioner.eval(), matcher.eval()
    expected = []
    for name, pixels, captions in zip(batch.names, batch.pixels, batch.captions, strict=True):
        (written,) = Captioner(captioner, TOKENIZER).caption_pixels(
            pixels[None], config.prompt, config.generation)
        synthetic = written.caption.removeprefix(config.prompt).strip()
        for text in [*captions, synthetic]:
            ids = [TOKENIZER.enc_id, *TOKENIZER.encode(text.replace("!", ""))[1:]]
            with torch.no_grad():
                image_kv = matcher.stack("encoder").image_kv(matcher.encode_images(pixels[None]))
                logits = matcher.match_logits(PackedTexts.from_lists([ids]), torch.tensor([0]), image_kv)
                image = matcher.image_features(matcher.encode_images(pixels[None]))
                alone = matcher.text_features(PackedTexts.from_lists([[TOKENIZER.cls_id, *ids[1:]]]))
            expected.append((name, text, float(logits.softmax(-1)[0, 1]), float((image * alone).sum())))
    return expected


@pytest.mark.parametrize("same_model", [False, True])
def test_rows_equal_captions_and_scores_made_one_at_a_time(same_model):
    captioner, matcher = model(1), model(1 if same_model else 2)
    config = CapFiltConfig(generation=GenerationConfig(top_p=0.9, max_length=12, min_length=6, seed=7))
    batch = web_batch()
    expected = one_by_one(captioner, matcher, batch, config)
    rows = run(captioner, matcher, [batch], config).rows
    assert [(row.image, row.text) for row in rows] == [(name, text) for name, text, *_ in expected]
    assert [row.itm for row in rows] == pytest.approx([itm for *_, itm, _ in expected], abs=1e-5)
    assert [row.itc for row in rows] == pytest.approx([itc for *_, itc in expected], abs=1e-5)
    origins = [origin for captions in CAPTIONS for origin in ["web"] * len(captions) + ["synthetic"]]
    assert [row.origin for row in rows] == origins
    assert [row.kept for row in rows] == [row.itm >= 0.5 and row.text != "" for row in rows]
    assert len({row.text for row in rows if row.origin == "synthetic"}) > 1


def test_a_caption_depends_on_seed_and_image_alone():
    def synthetic(batches, seed=0):
        generation = GenerationConfig(top_p=0.95, max_length=14, min_length=8, seed=seed)
        result = run(model(1), model(2), batches, CapFiltConfig(generation=generation))
        return {row.image: row.text for row in result.of_origin("synthetic")}

    whole = web_batch()
    parts = [WebBatch(whole.names[a:b], whole.pixels[a:b], whole.captions[a:b]) for a, b in ((3, 5), (0, 3))]
    assert synthetic(parts) == synthetic([whole])
    assert synthetic([whole], seed=1) != synthetic([whole])


def test_the_first_token_of_the_filter_is_explicit():
    enc, cls = (run(model(1), model(2), [web_batch()], CapFiltConfig(first_token=token)).rows
                for token in ("[ENC]", "[CLS]"))
    text = TOKENIZER.pack(["a red circle"], "[CLS]")
    scores = Matcher(model(2), TOKENIZER).score_pixels(web_batch().pixels[:1], text)
    assert cls[0].itm == pytest.approx(float(scores.itm), abs=1e-6)
    assert abs(enc[0].itm - cls[0].itm) > 1e-4


@pytest.mark.parametrize("threshold, kept", [(0.0, {True}), (1.0, {False})])
def test_the_threshold_decides_and_a_text_without_words_is_never_kept(threshold, kept):
    result = run(model(1), model(2), [web_batch([["red"], ["", " . "]])], CapFiltConfig(threshold=threshold))
    assert {row.kept for row in result.rows if row.text.strip(" .")} == kept
    assert not any(row.kept for row in result.rows if not row.text.strip(" ."))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_stream_gives_each_image_with_the_rows_of_a_batch(batch_size):
    """Several captions per image; of those that pass, only the best is kept."""
    generation = GenerationConfig(top_p=0.9, max_length=12, min_length=6, n_best=3)
    config = CapFiltConfig(generation=generation, threshold=0.4, keep="best")
    batch, tasks = web_batch(), (Captioner(model(1), TOKENIZER), Matcher(model(2), TOKENIZER))
    images = [WebImage(*image) for image in zip(batch.names, batch.pixels, batch.captions, strict=True)]
    streamed = list(capfilt_stream(*tasks, iter(images), config, batch_size=batch_size))
    assert [image for image, _ in streamed] == images
    expected = run(model(1), model(2), [batch], config).rows
    rows = [row for _, rows in streamed for row in rows]
    assert [(row.image, row.text, row.origin, row.kept) for row in rows] == [
        (row.image, row.text, row.origin, row.kept) for row in expected]
    assert [(row.itm, row.itc) for row in rows] == [
        pytest.approx((row.itm, row.itc), abs=1e-6) for row in expected]
    for image, mine in streamed:
        assert [row.origin for row in mine] == ["web"] * len(image.captions) + ["synthetic"] * 3
        passing = [row.itm for row in mine if row.itm >= 0.4 and row.text]
        assert [row.itm for row in mine if row.kept] == ([max(passing)] if passing else [])
    assert 0 < sum(row.kept for row in rows) <= len(images)


def test_models_in_training_give_the_same_rows_and_go_on_training():
    expected = run(model(1).eval(), model(2).eval(), [web_batch()]).rows
    assert run(model(1).train(), model(2).train(), [web_batch()]).rows == expected
    assert model(1).training and model(2).training


def test_published_settings():
    assert (NUCLEUS.top_p, NUCLEUS.beams, NUCLEUS.max_length, NUCLEUS.min_length) == (0.9, 1, 20, 5)
    assert CapFiltConfig().threshold == 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        CapFiltConfig(threshold=1.5)
    with pytest.raises(ValueError, match="keep is 'all'"):
        CapFiltConfig(keep="all")
    with pytest.raises(ValueError, match="the prompt has 4 tokens"):
        run(model(1), model(2), [web_batch()], CapFiltConfig(generation=GenerationConfig(max_length=4)))
    with pytest.raises(ValueError, match="same images, got 1, 2 and 0"):
        WebBatch(["a"], torch.zeros(2, 3, 16, 16), [])
    with pytest.raises(ValueError, match="captioner takes images of 16 px, the filter of 24"):
        run(model(1), model(2, 24), [web_batch()])


def test_no_image_gives_no_row():
    assert run(model(1), model(2), [web_batch([])]).rows == []


def test_jsonl(tmp_path):
    rows = [CapFiltRow("a.jpg", "café \u2028 “ring”", "web", 0.25, -0.5, False, False),
            CapFiltRow("b", "x", "synthetic", 1.0, 0.75, True, True)]
    CapFiltResult(rows).write_jsonl(tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [CapFiltRow(**json.loads(line)) for line in lines] == rows
    assert list(json.loads(lines[0])) == ["image", "text", "origin", "itm", "itc", "kept", "cut"]


# ---------------------------------------------------------------- quality


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_quality_equals_counting_sets(decisions):
    kept = {i for i, (k, _) in enumerate(decisions) if k}
    right = {i for i, (_, r) in enumerate(decisions) if r}
    every = set(range(len(decisions)))
    assume(right and right != every)
    removed, wrong = every - kept, every - right
    quality = filter_quality(*zip(*decisions, strict=True))
    assert quality.removal_precision == (len(removed & wrong) / len(removed) if removed else 0)
    assert quality.removal_recall == len(removed & wrong) / len(wrong)
    assert quality.keeping_precision == (len(kept & right) / len(kept) if kept else 0)
    assert quality.keeping_recall == len(kept & right) / len(right)


def test_quality_of_perfect_idle_and_random_filters():
    right = [True, True, True, False]
    perfect = filter_quality(right, right)
    assert (perfect.removal_precision, perfect.removal_recall) == (1, 1)
    assert (perfect.keeping_precision, perfect.keeping_recall) == (1, 1)
    assert (perfect.chance_removal_precision, perfect.chance_removal_recall) == (0.25, 0.25)
    idle = filter_quality([True] * 4, right)
    assert (idle.removal_precision, idle.removal_recall, idle.keeping_recall) == (0, 0, 1)

    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(40_000, generator=generator) < 0.7).tolist()
    kept = (torch.rand(40_000, generator=generator) < 0.6).tolist()
    drawn = filter_quality(kept, right)
    for name in ("removal_precision", "removal_recall", "keeping_precision", "keeping_recall"):
        assert getattr(drawn, name) == pytest.approx(getattr(drawn, f"chance_{name}"), abs=0.01)


def test_quality_needs_right_and_wrong_captions():
    with pytest.raises(ValueError, match="of 2 captions 2 are right"):
        filter_quality([True, False], [True, True])
    with pytest.raises(ValueError, match="got 1 and 2"):
        filter_quality([True], [True, False])


def test_a_filter_is_calibrated_on_each_pair_with_its_own_image(tmp_path, monkeypatch):
    """In batches, compared with every pair scored alone."""
    monkeypatch.setattr(calibration, "BATCH", 2)
    write_scenes(tmp_path, 5, "train", seed=0, noise=0.0, image_size=16)
    matcher = Matcher(model(2), TOKENIZER)
    images = annotated_images(tmp_path, None)
    for token in ("[ENC]", "[CLS]"):
        alone = sorted(float(matcher.score(image.load(), image.captions, first_token=token).itm)
                       for image in images)
        assert len(set(alone)) == 5
        assert calibration.calibrate(matcher, images, 0.6, token) == pytest.approx(alone[2], abs=1e-6)
    with pytest.raises(ValueError, match="calibration needs clean pairs"):
        calibration.calibrate(matcher, [], 0.6)


def test_the_calibrated_threshold_keeps_the_share_of_clean_pairs():
    clean = [i / 100 for i in range(100)]
    for keep in (0.5, 0.9, 0.97, 1.0):
        threshold = calibrated_threshold(clean, keep)
        assert sum(p >= threshold for p in clean) == round(100 * keep)
    assert calibrated_threshold([0.4], 0.97) == 0.4


@pytest.mark.parametrize(("clean", "keep"), [([], 0.9), ([0.5], 0.0), ([0.5], 1.5)])
def test_a_calibration_without_pairs_or_share_is_refused(clean, keep):
    with pytest.raises(ValueError, match="calibration needs clean pairs"):
        calibrated_threshold(clean, keep)
