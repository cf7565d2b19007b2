"""`blip-fast evaluate`: the figures equal those of the functions that it calls, in every form of the data."""

import json

import numpy as np
import pytest
import torch

from blip_fast.checkpoint import save_native
from blip_fast.cli import main
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.data.shards.shards import Sample, write_shards
from blip_fast.evaluation import itm_score
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.scenes.scenes import VOCABULARY, caption, chance_levels, sample_scenes, write_scenes
from blip_fast.scenes.slots import slot_scores
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher

TOKENIZER = Tokenizer([*BERT_TOKENS, *VOCABULARY])
COUNT = 7


def tiny_model():
    torch.manual_seed(0)
    tokens = SpecialTokens(TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.bos_id,
                           TOKENIZER.enc_id)
    model = BlipModel(BlipConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2),
        text=TextConfig(vocab_size=TOKENIZER.vocab_size, width=32, layers=2, heads=2, mlp_width=48,
                        max_positions=64),
        tokens=tokens, embed_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_native(tiny_model(), TOKENIZER, directory)
    return str(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of split `test`, and two images of split `train` with two captions each."""
    directory = tmp_path_factory.mktemp("scenes")
    rows = write_scenes(directory, COUNT + 2, "test", seed=1, noise=0.0, image_size=32)
    for i, row in enumerate(rows):
        row["split"] = "test" if i < COUNT else "train"
    rows[0]["captions"].append("A BLUE ring!")
    (directory / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return directory


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The same images, packed into shards."""
    directory = tmp_path_factory.mktemp("shards")
    samples = [Sample(f"{i:05d}", (folder / image.name).read_bytes(), image.row)
               for i, image in enumerate(annotated_images(folder, None))]
    write_shards(samples, directory, samples_per_shard=4)
    return directory


def evaluate(capsys, *arguments):
    assert main(["evaluate", *arguments, "--dtype", "float32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_retrieval_figures_equal_a_full_sort_of_all_pairs(checkpoint, folder, capsys):
    said = evaluate(capsys, "retrieval", "--model", checkpoint, "--data", str(folder))
    images = annotated_images(folder, "test")
    texts = [text.lower().replace("!", "") for image in images for text in image.captions]
    right = np.array([[text in [c.lower().replace("!", "") for c in image.captions] for text in texts]
                      for image in images])
    matcher = Matcher(tiny_model(), TOKENIZER)
    pixels = evaluation_transform([image.load() for image in images], 32)
    cosines = matcher.score_pixels(pixels, TOKENIZER.pack(texts)).itc
    scores = (matched_logits(matcher.model, pixels, texts) + cosines).numpy()
    for name, table, marks in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        order = np.argsort(-table, axis=1)
        for k in (1, 5, 10):
            hits = np.take_along_axis(marks, order[:, :k], axis=1).any(axis=1).mean()
            assert said[f"{name}_r{k}"] == pytest.approx(hits)
    assert (said["images"], said["texts"], said["pairs"]) == (COUNT, COUNT + 1, COUNT * (COUNT + 1))
    assert said["chance"]["t2i_r1"] == pytest.approx(1 / COUNT)


def matched_logits(model, pixels, texts):
    """Matching logits [images, texts], computed one image at a time."""
    packed = TOKENIZER.pack(texts, "[ENC]")
    with torch.no_grad():
        image_kvs = [model.stack("encoder").image_kv(model.encode_images(p[None])) for p in pixels]
        zeros = torch.zeros(len(texts), dtype=torch.int64)
        return torch.stack([model.match_logits(packed, zeros, kv)[:, 1] for kv in image_kvs])


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_a_folder_and_its_shards_give_the_same_figures(task, checkpoint, folder, shards, capsys):
    of_folder, of_shards = (evaluate(capsys, task, "--model", checkpoint, "--data", str(data))
                            for data in (folder, shards))
    assert of_shards == of_folder


def test_caption_figures_and_rows(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "new" / "captions.jsonl"
    said = evaluate(capsys, "caption", "--model", checkpoint, "--data", str(folder), "--output", str(output))
    images = annotated_images(folder, "test")
    captions = Captioner(tiny_model(), TOKENIZER)([folder / image.name for image in images],
                                                  strip_prompt=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [{"image": image.name, "caption": text.caption, "references": image.captions}
                    for image, text in zip(images, captions, strict=True)]
    assert said["lm_loss"] == pytest.approx(prompted_loss(folder, images), rel=1e-5)
    assert 0 < said["unigram_entropy"] < said["unigram_cross_entropy"]
    assert {"slot_accuracy", "exact_match"} <= set(said) and said["chance"]["slot_accuracy"] > 0


def test_captions_by_the_authors_beam_rule(folder, tmp_path, capsys):
    """With a model whose texts end at different lengths, so that the two rules choose different texts."""
    model, images = tiny_model(), annotated_images(folder, "test")
    with torch.no_grad():
        model.lm_head.bias[TOKENIZER.sep_id] += 4
    save_native(model, TOKENIZER, tmp_path / "model")
    captions = {}
    for rule in ("transformers5", "authors"):
        evaluate(capsys, "caption", "--model", str(tmp_path / "model"), "--data", str(folder),
                 "--beam-rule", rule, "--output", str(tmp_path / rule))
        captions[rule] = [json.loads(line)["caption"] for line in (tmp_path / rule).read_text().splitlines()]
        generation = GenerationConfig(beams=3, max_length=20, min_length=5, beam_rule=rule)
        expected = Captioner(model, TOKENIZER)([folder / image.name for image in images],
                                               "a picture of", generation, strip_prompt=True)
        assert captions[rule] == [text.caption for text in expected]
    assert captions["transformers5"] != captions["authors"]


def test_caption_metrics_by_domain(checkpoint, folder, tmp_path, capsys):
    """Equal to pycocoevalcap on each domain alone; without domains, or with only one, they are left out."""
    pytest.importorskip("pycocoevalcap", reason="caption metrics need the extra `eval`")
    from blip_fast.metrics.captions import CaptionMetrics

    domains = [f"{name}-domain" for name in ("near", "in", "in", "near", "out", "in", "out")]

    def said(named: list[str | None]) -> tuple[dict, list[dict]]:
        content = [{"image": str(folder / image.name), "captions": image.captions}
                   | ({"domain": its} if its else {})
                   for image, its in zip(annotated_images(folder, "test"), named, strict=True)]
        (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        figures = evaluate(capsys, "caption", "--model", checkpoint, "--data", str(tmp_path),
                           "--metrics", "java-free", "--output", str(tmp_path / "captions.jsonl"))
        return figures, [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]

    figures, rows = said([*domains])
    for domain in set(domains):
        mine = [row for row, its in zip(rows, domains, strict=True) if its == domain]
        alone = CaptionMetrics("java-free")([row["caption"] for row in mine],
                                            [row["references"] for row in mine])
        assert {name: figures[f"{name}_{domain}"] for name in alone} == pytest.approx(alone)
    assert "cider" in figures and sum("domain" in name for name in figures) == 3 * 6
    for named in ([*domains[:-1], None], ["in-domain"] * COUNT):
        assert not any("domain" in name for name in said(named)[0])


def test_caption_metrics_and_the_itm_score(checkpoint, folder, tmp_path, capsys):
    pytest.importorskip("pycocoevalcap", reason="caption metrics need the extra `eval`")
    from blip_fast.metrics.captions import CaptionMetrics

    output = tmp_path / "captions.jsonl"
    arguments = ["caption", "--model", checkpoint, "--data", str(folder), "--metrics", "java-free"]
    said = evaluate(capsys, *arguments, "--matcher", checkpoint, "--output", str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    captions = [row["caption"] for row in rows]
    assert said["metrics"] == "java-free"
    figures = CaptionMetrics("java-free")(captions, [row["references"] for row in rows])
    assert {name: said[name] for name in figures} == pytest.approx(figures)
    matcher = Matcher(tiny_model(), TOKENIZER)
    each = [matcher.score(folder / row["image"], row["caption"], first_token="[ENC]").itm.item()
            for row in rows]
    assert said["itm_score"] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert main(["evaluate", *arguments]) == 0
    assert "java-free" in capsys.readouterr().out


def test_an_empty_caption_has_no_itm_score(folder):
    images, matcher = annotated_images(folder, "test"), Matcher(tiny_model(), TOKENIZER)
    captions = [image.captions[0] for image in images]
    whole = itm_score(matcher, images, captions)
    alone = matcher.score(images[2].load(), captions[2], first_token="[ENC]").itm.item()
    without = itm_score(matcher, images, [*captions[:2], " .! ", *captions[3:]])
    assert without == pytest.approx(whole - alone / COUNT)
    assert itm_score(matcher, images, [""] * COUNT) == 0
    for some, texts in (([], []), (images, captions[1:])):
        with pytest.raises(ValueError, match="one caption an image"):
            itm_score(matcher, some, texts)


def prompted_loss(folder, images):
    """The mean cross-entropy per token, without the prompt's tokens."""
    model, losses = tiny_model(), []
    for image in images:
        pixels = evaluation_transform([load_image(folder / image.name)], 32)
        with torch.no_grad():
            image_kv = model.stack("decoder").image_kv(model.encode_images(pixels))
            for text in image.captions:
                packed = TOKENIZER.pack([f"a picture of {text.lower().replace('!', '')}"], "[DEC]")
                log_probs = model.lm_logits(packed, torch.tensor([0]), image_kv).double().log_softmax(-1)
                ids = packed.token_ids
                losses += [-log_probs[i, ids[i + 1]] for i in range(3, len(ids) - 1)]
    return float(torch.stack(losses).mean())


def test_without_training_captions_and_scenes_their_figures_are_left_out(checkpoint, folder,
                                                                         tmp_path, capsys):
    row = {"image": str(folder / "000000.png"), "caption": "a red circle"}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(row))
    said = evaluate(capsys, "caption", "--model", checkpoint, "--data", str(tmp_path), "--prompt", "")
    assert said["unigram_cross_entropy"] is None and "slot_accuracy" not in said
    assert main(["evaluate", "caption", "--model", checkpoint, "--data", str(tmp_path)]) == 0
    assert "lm_loss" in capsys.readouterr().out


def test_slot_scores_of_the_truth_and_of_another_scene():
    scenes = sample_scenes(12, "train", seed=3)
    truth = [f"a picture of {caption(scene.turned())}" for scene in scenes]
    scores = slot_scores(truth, scenes)
    assert (scores.slot_accuracy, scores.exact_match) == (1, 1)
    assert (scores.chance_slot_accuracy, scores.chance_exact_match) == chance_levels(scenes, 0)
    nothing = slot_scores(["a dog"] * 12, scenes)
    assert (nothing.slot_accuracy, nothing.exact_match) == (0, 0)
    with pytest.raises(ValueError, match="got 1 captions for 12 scenes"):
        slot_scores(["x"], scenes)


@pytest.mark.parametrize("arguments, said", [
    (["retrieval", "--data", "{empty}"], "neither annotations.jsonl nor shards.json"),
    (["retrieval", "--data", "{folder}", "--split", "validation"], "no image of split 'validation'"),
    (["retrieval", "--data", "{folder}", "--top-k", "-1"], "top_k is -1"),
    (["retrieval", "--data", "{folder}", "--first-token", "[DEC]"], "first_token is '[DEC]'"),
    (["retrieval", "--data", "{folder}", "--output", "x.jsonl"], "--output"),
    (["caption", "--data", "{folder}", "--metrics", "meteor"],
     "java-free, coco-without-spice, coco, got 'meteor'"),
    (["caption", "--data", "{bare}", "--metrics", "java-free"], "000000.png has no caption with a word"),
    (["caption", "--data", "{folder}", "--beams", "0"], "beams must be at least 1"),
    (["caption", "--data", "{folder}", "--beam-rule", "best"], "beam_rule must be transformers5 or authors"),
    (["retrieval", "--data", "{broken}"], "row 2 is not JSON"),
    (["caption", "--data", "{lost}"], "lost.png: no such file"),
    (["retrieval", "--data", "{bare}"], "000000.png has no caption"),
])
def test_bad_input_is_one_clear_line(arguments, said, checkpoint, folder, tmp_path, capsys):
    places = {"folder": folder} | {name: tmp_path / name for name in ("empty", "broken", "lost", "bare")}
    for name, rows in (("empty", None), ("broken", '{"image": "a.png", "captions": []}\n{'),
                       ("lost", '{"image": "lost.png", "captions": ["a"]}'),
                       ("bare", json.dumps({"image": str(folder / "000000.png")}))):
        places[name].mkdir()
        if rows is not None:
            (places[name] / "annotations.jsonl").write_text(rows)
    arguments = [argument.format(**places) for argument in arguments]
    assert main(["evaluate", *arguments, "--model", checkpoint]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_photographs(data_root, checkpoint, capsys):
    """Real annotations can be read: 100 test photographs with five captions each."""
    images = annotated_images(data_root / "flickr8k", "test")
    assert len(images) == 100 and all(len(image.captions) == 5 for image in images)
    said = evaluate(capsys, "retrieval", "--model", checkpoint, "--data", str(data_root / "flickr8k"),
                    "--top-k", "4")
    assert said["texts"] == 500 and said["chance"]["t2i_r10"] == pytest.approx(0.1)
    assert said["t2i_r10"] < 0.4  # an untrained model is near chance, so no answer leaks into the scores
