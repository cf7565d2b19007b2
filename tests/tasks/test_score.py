"""Scores of images with texts: transformers' numbers, for all pairs at once."""

import json

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from PIL import Image

from blip_fast.cli import main
from blip_fast.media.images import evaluation_transform
from blip_fast.model.blip import BlipModel
from blip_fast.tasks import matcher as matching
from blip_fast.tasks.matcher import Matcher

TEXTS = ["dog", "a red ball on a table", "two dogs run", "a man rides a horse left of the large blue circle"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("matching")
    return directory, save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)


@pytest.fixture(scope="module")
def matcher(checkpoint) -> Matcher:
    return Matcher.from_pretrained(checkpoint[0], dtype="float32")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(5)]


@pytest.mark.parametrize("pairs", [512, 3])
def test_transformers(checkpoint, matcher, images, monkeypatch, pairs):
    """Matching probabilities and cosines of every pair, for every batch size."""
    monkeypatch.setattr(matching, "CPU_TEXTS", pairs)
    _, theirs = checkpoint
    pixels = evaluation_transform(images, IMAGE_SIZE)
    scores = matcher.score(images, TEXTS, batch_size=2)
    assert scores.itm.shape == scores.itc.shape == (5, 4)
    for j, text in enumerate(TEXTS):
        ids = torch.tensor([matcher.tokenizer.encode(text)] * 5)
        with torch.no_grad():
            itm = theirs(ids, pixels).itm_score.softmax(-1)[:, 1]
            itc = theirs(ids, pixels, use_itm_head=False).itm_score[:, 0]
        torch.testing.assert_close(scores.itm[:, j], itm, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.itc[:, j], itc, rtol=0, atol=1e-5)


def test_published_code(data_root, bert_vocabulary):
    """ITM with [CLS] and with [ENC], and ITC, equal to the published code's results; at most 35 tokens."""
    path = data_root / "original_blip" / "itm.pth"
    matcher = Matcher.from_pretrained(path, tokenizer=bert_vocabulary, dtype="float32")
    captions = json.loads(path.with_suffix(".json").read_text())["captions"]
    with np.load(path.with_name("itm_io.npz")) as arrays:
        images, logits, with_enc, itc = (torch.from_numpy(arrays[name]) for name in (
            "images", "itm_logits", "contrast_itm_logits_with_enc", "itc_sim"))
    assert int(matcher.pack(captions).lengths.max()) == 35
    for first_token, expected in (("[CLS]", logits), ("[ENC]", with_enc)):
        scores = matcher.score_pixels(images, matcher.pack(captions, first_token))
        torch.testing.assert_close(scores.itm.diagonal(), expected.softmax(-1)[:, 1], rtol=0, atol=2e-5)
        torch.testing.assert_close(scores.itc, itc, rtol=0, atol=2e-5)


def test_one_image_one_text(matcher, images):
    """Neither needs a list; another first token than [CLS] changes only ITM; no images give no rows."""
    scores = matcher.score(images[0], "a dog")
    assert scores.itm.shape == (1, 1)
    with_enc = matcher.score(images[:1], ["a dog"], first_token="[ENC]")
    assert torch.equal(scores.itc, with_enc.itc) and not torch.allclose(scores.itm, with_enc.itm, atol=1e-6)
    assert matcher.score([], ["a dog"]).itm.shape == (0, 1)


def test_wrong_calls(matcher, images, tmp_path):
    with pytest.raises(ValueError, match="' '"):
        matcher.score(images, ["a dog", " "])
    with pytest.raises(ValueError, match="DOG"):
        matcher.score(images, ["a dog"], first_token="[DOG]")
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="matching"):
        Matcher.from_pretrained(tmp_path, dtype="float32")


def test_command(checkpoint, matcher, images, tmp_path, capsys):
    """One JSON object per text; without --json, a plain line."""
    path = tmp_path / "picture.png"
    images[0].save(path)
    assert main(["score", "--model", str(checkpoint[0]), "--dtype", "float32", "--json",
                 str(path), *TEXTS]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = matcher.score(path, TEXTS)
    assert [(row["image"], row["text"]) for row in rows] == [(str(path), text) for text in TEXTS]
    assert [row["itm"] for row in rows] == pytest.approx(scores.itm[0].tolist(), abs=1e-6)
    assert [row["itc"] for row in rows] == pytest.approx(scores.itc[0].tolist(), abs=1e-6)
    assert main(["score", "--model", str(checkpoint[0]), "--dtype", "float32", str(path), "a dog"]) == 0
    assert capsys.readouterr().out.startswith("itm 0.")


def test_command_refuses(checkpoint, images, tmp_path, capsys):
    """Bad input exits with status 2 and one line that names it."""
    path = tmp_path / "picture.png"
    images[0].save(path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for named, arguments in {
        "broken.jpg": (tmp_path / "broken.jpg", "a dog"),
        "missing.jpg": (tmp_path / "missing.jpg", "a dog"),
        "no token": (path, "a dog", ""),
        "[DOG]": (path, "a dog", "--first-token", "[DOG]"),
    }.items():
        assert main(["score", "--model", str(checkpoint[0]), "--dtype", "float32",
                     *map(str, arguments)]) == 2, named
        out, err = capsys.readouterr()
        assert not out and named in err and err.count("\n") == 1, err


# ---------------------------------------------------------------- files of pairs


@pytest.fixture
def pairs(images, tmp_path):
    """Six rows about three pictures, one of them broken; `more` is a key of the user."""
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for name, image in zip(names, images, strict=False):
        image.save(name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [{"image": names[0], "text": TEXTS[0]}, {"image": names[0], "text": TEXTS[1], "more": 7},
            {"image": str(tmp_path / "broken.png"), "text": TEXTS[0]}, {"image": names[1], "text": TEXTS[3]},
            {"image": names[0], "text": TEXTS[2]}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.mark.parametrize("batch_size", [1, 16])
def test_pairs(checkpoint, matcher, pairs, capsys, batch_size):
    """Each row with its scores, in order; a broken image costs only its rows, and the exit status is 1."""
    path, rows = pairs
    arguments = ["score", "--model", str(checkpoint[0]), "--dtype", "float32", "--pairs", str(path),
                 "--batch-size", str(batch_size)]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert "broken.png" in err and "precision: float32" in err and err.count("\n") == 2
    for row, scored in zip(rows, found, strict=True):
        assert {key: scored[key] for key in row} == row
        if "broken" in row["image"]:
            assert "broken.png" in scored["error"] and "itm" not in scored
        else:
            expected = matcher.score(row["image"], row["text"])
            assert scored["itm"] == pytest.approx(expected.itm.item(), abs=1e-6)
            assert scored["itc"] == pytest.approx(expected.itc.item(), abs=1e-6)


def test_an_image_of_many_pairs_is_encoded_once(checkpoint, pairs, monkeypatch, capsys):
    encoded, encode = [], BlipModel.encode_images
    monkeypatch.setattr(BlipModel, "encode_images",
                        lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels))
    path, rows = pairs
    path = path.with_suffix(".tsv")
    path.write_text("".join(f"{rows[0]['image']}\t{text}\n" for text in TEXTS * 3))
    assert main(["score", "--model", str(checkpoint[0]), "--dtype", "float32", "--pairs", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12 and sum(encoded) == 1


@pytest.mark.parametrize("left", [0, 1, 3, 5])
def test_resume(checkpoint, pairs, tmp_path, capsys, left):
    """A file truncated anywhere, even within a line, is completed without scoring anything twice."""
    path, rows = pairs
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    arguments = ["score", "--model", str(checkpoint[0]), "--dtype", "float32", "--pairs",
                 str(path), "--output"]
    assert main([*arguments, str(whole)]) == 1
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == len(rows)
    cut.write_text("".join(lines[:left]) + "".join(lines[left : left + 1])[:9])
    status = main([*arguments, str(cut), "--resume"])
    assert status == (1 if left < 3 else 0)
    for row, expected in zip(cut.read_text().splitlines(), lines, strict=True):
        assert json.loads(row) == pytest.approx(json.loads(expected), abs=1e-6)


def test_files_of_pairs_that_are_refused(checkpoint, pairs, tmp_path, capsys):
    _, rows = pairs
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + '\n{"image": "a.png"}\n')
    (tmp_path / "bad.tsv").write_text("a.png a dog\n")
    (tmp_path / "empty.tsv").write_text("\n")
    (tmp_path / "pairs.csv").write_text("")
    (tmp_path / "others.jsonl").write_text("no row\n")
    for said, arguments in {
        'bad.jsonl, line 2 has no "text"': ["--pairs", "bad.jsonl"],
        "bad.tsv, line 1 is not an image, a tab and a text": ["--pairs", "bad.tsv"],
        "empty.tsv holds no line": ["--pairs", "empty.tsv"],
        "must be a .jsonl file": ["--pairs", "pairs.csv"],
        "others.jsonl, line 1 is no JSON object": ["--pairs", "pairs.jsonl", "--output",
                                                   "others.jsonl", "--resume"],
        "others.jsonl exists": ["--pairs", "pairs.jsonl", "--output", "others.jsonl"],
        "--resume needs --output": ["--pairs", "pairs.jsonl", "--resume"],
        "--batch-size must be at least 1": ["--pairs", "pairs.jsonl", "--batch-size", "0"],
        "first token '[DOG]'": ["--pairs", "pairs.jsonl", "--first-token", "[DOG]"],
        "are for --pairs": ["0.png", "a dog", "--output", "new.jsonl"],
        "no text to hold": ["0.png"],
        "name an image and its texts": [],
    }.items():
        arguments = [str(tmp_path / a) if "." in a else a for a in arguments]
        assert main(["score", "--model", str(checkpoint[0]), "--dtype", "float32", *arguments]) == 2, said
        out, err = capsys.readouterr()
        assert not out and said in err and err.count("\n") == 1, err
