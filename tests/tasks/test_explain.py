"""Grad-CAM maps against transformers' attention weights and autograd; words, and the picture."""

import json

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from PIL import Image

from blip_fast import cli
from blip_fast.commands.explain import COMMAND
from blip_fast.media.images import evaluation_transform
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.report.heat import COLUMNS, FONT_SIZE, MARGIN, overlay, sheet
from blip_fast.tasks.explainer import Explainer
from blip_fast.tasks.model_loading import load_for_task

GRID = IMAGE_SIZE // 16
TEXTS = ["a red ball on a table", "dog", "two dogs run left of the large blue circle"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("explaining")
    return directory, save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)


@pytest.fixture(scope="module")
def explainer(checkpoint) -> Explainer:
    return Explainer.from_pretrained(checkpoint[0])


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def published(theirs, pixels, ids: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ITM's logits [2], and maps [tokens, grid, grid] from transformers' attention probabilities and their
    gradients, combined as in the published code."""
    kept = []

    def keep(module, inputs, outputs) -> None:
        outputs[1].retain_grad()
        kept.append(outputs[1])

    hook = theirs.text_encoder.encoder.layer[layer].crossattention.self.register_forward_hook(keep)
    logits = theirs(torch.tensor([ids]), pixels).itm_score
    hook.remove()
    logits[:, 1].sum().backward()
    (weights,) = kept  # [1, heads, tokens, visual tokens]
    maps = weights[..., 1:] * weights.grad[..., 1:].clamp(min=0)
    return logits[0].detach(), maps[0].mean(0).view(len(ids), GRID, GRID).detach()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("first_token", ["[CLS]", "[ENC]"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_transformers(checkpoint, explainer, picture, layer, first_token, backend, monkeypatch):
    """Maps of every token, for texts of several lengths at once, with either attention backend."""
    monkeypatch.setenv("BLIP_FAST_ATTENTION", backend)
    _, theirs = checkpoint
    pixels = evaluation_transform([picture], IMAGE_SIZE)
    texts = [explainer.tokenizer.encode(text, first_token) for text in TEXTS]
    logits, maps = explainer.explain_pixels(pixels[0], PackedTexts.from_lists(texts), layer)
    for ids, ours, logit in zip(texts, maps.split([len(ids) for ids in texts]), logits, strict=True):
        expected_logits, expected = published(theirs, pixels, ids, layer)
        torch.testing.assert_close(logit, expected_logits, rtol=0, atol=2e-5)
        assert expected.max() > 1e-4 and (ours >= 0).all()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.max().item())


def test_one_text(checkpoint, explainer, picture):
    """A word's map is the mean over its tokens, the text's map the mean over all words. The default layer is
    at the published fraction. The probability equals the matcher's."""
    text = "a red tablet on a table"
    ids = explainer.tokenizer.encode(text)
    logits, maps = published(checkpoint[1], evaluation_transform([picture], IMAGE_SIZE), ids, layer=1)
    explanation = explainer(picture, text)
    assert explanation.itm == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert [word.word for word in explanation.words] == text.split()
    assert len(ids) - 2 > len(explanation.words), "some word has several pieces"
    for word, (_, places) in zip(explanation.words, explainer.tokenizer.words(text), strict=True):
        torch.testing.assert_close(word.map, maps[list(places)].mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(explanation.text.map, maps[1:-1].mean(0), rtol=1e-4, atol=1e-6)
    whole = explainer(picture, text, [text]).words
    assert len(whole) == 1 and torch.equal(whole[0].map, explanation.text.map)


def test_chosen_words(explainer, picture):
    """In upper or lower case, at every occurrence; phrases too; not parts of words."""
    text = "a red Ball on a tablet"
    every = explainer(picture, text).words
    ball, *a = explainer(picture, text, ["BALL", "a"]).words
    assert torch.equal(ball.map, every[2].map)
    assert [torch.equal(found.map, every[place].map)
            for found, place in zip(a, (0, 4), strict=True)] == [True, True]
    assert explainer(picture, text, ["red ball"]).words[0].map.shape == (GRID, GRID)
    assert explainer.tokenizer.encode("table")[1:-1] == explainer.tokenizer.encode("tablet")[1:2]
    for missing in ("green", "ball red", "table", " "):
        with pytest.raises(ValueError, match="has no word"):
            explainer(picture, text, [missing])


def test_nothing_of_the_model_changes(explainer, picture):
    """Neither mode, gradients nor hooks; later results are the same as before."""
    model = explainer.model.train()
    before = {name: module._forward_hooks | module._forward_pre_hooks
              for name, module in model.named_modules()}
    first = explainer(picture, TEXTS[0])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert before == {name: module._forward_hooks | module._forward_pre_hooks
                      for name, module in model.named_modules()}
    model.eval()
    assert torch.equal(first.text.map, explainer(picture, TEXTS[0]).text.map)


def test_wrong_calls(checkpoint, explainer, picture, tmp_path):
    with pytest.raises(ValueError, match="layer is 3"):
        explainer(picture, "a dog", layer=3)
    with pytest.raises(ValueError, match="layer is -1"):
        explainer(picture, "a dog", layer=-1)
    with pytest.raises(ValueError, match="no token"):
        explainer(picture, " ")
    with pytest.raises(ValueError, match="DOG"):
        explainer(picture, "a dog", first_token="[DOG]")
    with pytest.raises(ValueError, match="packed"):
        Explainer(*load_for_task(checkpoint[0], dtype="float32"))
    with pytest.raises(ValueError, match="int8 is for inference alone"):
        Explainer.from_pretrained(checkpoint[0], dtype="int8")
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="matching"):
        Explainer.from_pretrained(tmp_path)


# ---------------------------------------------------------------- the picture


def test_overlay():
    """The hot patch is red and hides the picture; cold patches show it; a uniform map changes nothing."""
    grey = Image.new("RGB", (80, 40), (100, 100, 100))
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 7.0
    shown = np.asarray(overlay(grey, heat)).astype(int)
    assert shown.shape == (40, 80, 3)
    red, green, blue = shown[15, 50]  # the middle of row 1, column 2
    assert red > 200 and green < 130 and blue < 60
    assert (shown[35, 5] == 100).all()  # the far corner
    hottest = np.unravel_index((shown[..., 0] - shown[..., 2]).argmax(), (40, 80))
    assert 10 <= hottest[0] < 20 and 40 <= hottest[1] < 60
    assert (np.asarray(overlay(grey, np.full((4, 4), 3.0, np.float32))) == 100).all()
    assert np.array_equal(overlay(grey, heat), overlay(grey, 100 * heat - 3))


def test_sheet():
    """Panels are arranged in rows, each under its caption; a long caption takes several lines."""
    panels = [(Image.new("RGB", (50, 30), (10 * i, 0, 0)), f"word{i}") for i in range(COLUMNS + 2)]
    page = np.asarray(sheet(panels))
    line = FONT_SIZE + 7
    assert page.shape == (2 * (line + 30 + 2 * MARGIN) + MARGIN, COLUMNS * (50 + MARGIN) + MARGIN, 3)
    for i in range(COLUMNS + 2):
        top = MARGIN + line + (i // COLUMNS) * (line + 30 + 2 * MARGIN)
        left = MARGIN + (i % COLUMNS) * (50 + MARGIN)
        assert (page[top : top + 30, left : left + 50] == (10 * i, 0, 0)).all()
        assert page[top - line : top - 2, left : left + 50].min() < 128, "no caption"
    wrapped = np.asarray(sheet([(panels[0][0], "one two three four five")]))
    assert wrapped.shape[0] > line + 30 + 3 * MARGIN


def test_command(checkpoint, explainer, picture, tmp_path, capsys):
    path, output = tmp_path / "picture.png", tmp_path / "new" / "seen.png"
    picture.save(path)
    arguments = ["--model", str(checkpoint[0]), str(path), "a red ball", "--output", str(output)]
    assert cli._run("explain", COMMAND, [*arguments, "--json", "--word", "ball"]) == 0
    row = json.loads(capsys.readouterr().out)
    expected = explainer(path, "a red ball", ["ball"])
    assert (row["image"], row["text"]) == (str(path), "a red ball")
    assert [word["word"] for word in row["words"]] == ["ball"]
    assert row["itm"] == pytest.approx(expected.itm, abs=1e-6)
    torch.testing.assert_close(torch.tensor(row["map"]), expected.text.map)
    torch.testing.assert_close(torch.tensor(row["words"][0]["map"]), expected.words[0].map)
    two = Image.open(output).size
    assert cli._run("explain", COMMAND, arguments) == 0
    assert str(output) in capsys.readouterr().out
    assert Image.open(output).size[0] - two[0] == 2 * (360 + MARGIN)  # panels of three words instead of one


def test_command_refuses(checkpoint, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for said, arguments in {
        "broken.jpg": (tmp_path / "broken.jpg", "a dog", "--output", tmp_path / "seen.png"),
        "must end with one of .png": (path, "a dog", "--output", tmp_path / "seen"),
        "has no word 'cat'": (path, "a dog", "--output", tmp_path / "seen.png", "--word", "cat"),
        "layer is 12": (path, "a dog", "--output", tmp_path / "seen.png", "--layer", 12),
    }.items():
        with pytest.raises(ValueError, match=said):
            cli._run("explain", COMMAND, ["--model", str(checkpoint[0]), *map(str, arguments)])
    assert not (tmp_path / "seen.png").exists()
