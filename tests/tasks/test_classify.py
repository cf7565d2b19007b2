"""Zero-shot labels against transformers' features, compared in float64; the command on many images."""

import json

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from PIL import Image

from blip_fast import cli
from blip_fast.commands.classify import COMMAND
from blip_fast.media.images import ImageError, evaluation_transform
from blip_fast.tasks.classifier import TEMPLATES, Classifier

LABELS = ["dog", "red ball", "man", "wooden table", "blue {} square"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifying")
    return directory, save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)


@pytest.fixture(scope="module")
def classifier(checkpoint) -> Classifier:
    return Classifier.from_pretrained(checkpoint[0], dtype="float32")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(5)]


@pytest.fixture
def folder(images, tmp_path):
    """Five pictures and a broken one among them."""
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "2b.png").write_bytes(b"no image")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n\n")
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    return tmp_path


def run(capsys, checkpoint, *arguments) -> tuple[int, list[str], str]:
    status = cli._run("classify", COMMAND, ["--model", str(checkpoint[0]), "--dtype", "float32",
                                            *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


@pytest.mark.parametrize("templates", [TEMPLATES, ("{}",), ("two {}", "a {} and a {}")])
def test_transformers(checkpoint, classifier, images, templates):
    """In float64: cosines with the normalised mean of a label's prompt features, divided by τ, softmax."""
    _, theirs = checkpoint
    with torch.no_grad():
        states = theirs.vision_model(evaluation_transform(images, IMAGE_SIZE)).last_hidden_state
        image_features = torch.nn.functional.normalize(theirs.vision_proj(states[:, 0]).double(), dim=-1)
        means = []
        for label in LABELS:
            vectors = []
            for template in templates:
                ids = torch.tensor([classifier.tokenizer.encode(label.join(template.split("{}")))])
                states = theirs.text_encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                vectors.append(torch.nn.functional.normalize(theirs.text_proj(states[:, 0]).double(), dim=-1))
            mean = torch.stack(vectors).mean(dim=0)
            means.append(mean / mean.norm())
    cosines = image_features @ torch.cat(means).T
    expected = (cosines / 0.07).softmax(dim=-1)
    assert classifier.model.temperature.item() == pytest.approx(0.07)
    for found, row, cosine in zip(classifier(images, LABELS, templates=templates, top_k=9, batch_size=2),
                                  expected, cosines, strict=True):
        assert [each.label for each in found] == [LABELS[i] for i in row.argsort(descending=True)]
        for each in found:
            assert each.probability == pytest.approx(row[LABELS.index(each.label)].item(), abs=2e-5)
            assert each.itc == pytest.approx(cosine[LABELS.index(each.label)].item(), abs=2e-6)


def test_the_temperature_is_the_models(classifier, images):
    """A lower temperature makes the likeliest label likelier, by the factor of the formula."""
    before = classifier(images[0], LABELS)[0]
    with torch.no_grad():
        classifier.model.temperature.div_(2)
    after = classifier(images[0], LABELS)[0]
    with torch.no_grad():
        classifier.model.temperature.mul_(2)
    ratio = before[0].probability / before[1].probability
    assert after[0].probability / after[1].probability == pytest.approx(ratio**2, rel=1e-3)


def test_top_k_is_the_beginning_of_all(classifier, images):
    """Probabilities are still those among all labels; a single image needs no list."""
    (every,) = classifier(images[0], LABELS, top_k=99)
    assert len(every) == len(LABELS) and sum(each.probability for each in every) == pytest.approx(1, abs=1e-5)
    assert classifier(images[0], LABELS, top_k=2) == [every[:2]]
    assert classifier([], LABELS) == []


def test_a_broken_image(classifier, folder):
    paths = sorted(folder.glob("*.png"))
    labels = classifier.labels(LABELS)
    results = list(classifier.stream(paths, labels, batch_size=2))
    assert [each.image for each in results] == [str(path) for path in paths]
    broken = [path.name == "2b.png" for path in paths]
    assert [isinstance(each.result, ImageError) for each in results] == broken
    with pytest.raises(ImageError, match="2b"):
        classifier(paths, LABELS)


def test_wrong_calls(classifier, images, tmp_path):
    for said, labels, options in [
        ("a label and a template", [], {}), ("a label and a template", LABELS, {"templates": []}),
        ("'a dog'", LABELS, {"templates": ["{}", "a dog"]}),
        ("'man' is there twice", ["man", "dog", "man"], {}),
        ("' ' has no token", ["dog", " "], {}), ("top_k", LABELS, {"top_k": 0}),
        ("batch_size", LABELS, {"batch_size": 0}),
    ]:
        with pytest.raises(ValueError, match=said):
            classifier(images, labels, **options)
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="contrastive"):
        Classifier.from_pretrained(tmp_path, dtype="float32")


def test_command(checkpoint, classifier, folder, capsys):
    """A row per image as from the library; without --json, a line per label; a broken image costs its row."""
    paths = [path for path in sorted(folder.glob("*.png")) if path.name != "2b.png"]
    expected = dict(zip(map(str, paths), classifier(paths, LABELS, top_k=2), strict=True))
    status, lines, err = run(capsys, checkpoint, folder, "--labels", folder / "labels.txt",
                             "--top-k", 2, "--json", "--batch-size", 4)
    rows = {row["image"]: row for row in map(json.loads, lines)}
    assert status == 1 and "2b.png" in err and "2b.png" in rows.pop(str(folder / "2b.png"))["error"]
    assert rows.keys() == expected.keys()
    for image, row in rows.items():
        assert [label["label"] for label in row["labels"]] == [label.label for label in expected[image]]
        for label, wanted in zip(row["labels"], expected[image], strict=True):
            assert (label["probability"], label["itc"]) == pytest.approx((wanted.probability, wanted.itc),
                                                                         abs=1e-5)
    status, lines, _ = run(capsys, checkpoint, paths[0], "--labels", folder / "labels.json", "--top-k", 1,
                           "--template", "{}")
    (best,) = classifier(paths[0], LABELS, templates=["{}"], top_k=1)[0]
    assert (status, lines) == (0, [f"{paths[0]}\t{best.probability:.4f}\t{best.label}"])


def test_resume(checkpoint, folder, tmp_path, capsys):
    """A truncated file is completed to the rows of one run; prompts in a list are ignored."""
    (tmp_path / "list").write_text("".join(f"{path}\ta prompt\n" for path in sorted(folder.glob("*.png"))))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    arguments = ["--list", tmp_path / "list", "--labels", folder / "labels.txt", "--output"]
    assert run(capsys, checkpoint, *arguments, whole)[0] == 1
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    assert run(capsys, checkpoint, *arguments, cut, "--resume")[0] == 0
    assert cut.read_bytes().startswith(b"".join(lines[:4]))
    assert [json.loads(line)["image"] for line in cut.read_bytes().splitlines()] == [
        json.loads(line)["image"] for line in lines] == [str(path) for path in sorted(folder.glob("*.png"))]
    status, _, err = run(capsys, checkpoint, *arguments, cut, "--resume")
    assert status == 0 and "nothing left" in err


def test_command_refuses(checkpoint, folder):
    (folder / "empty.txt").write_text("\n")
    (folder / "twice.txt").write_text("dog\ndog\n")
    (folder / "bad.json").write_text('{"dog": 1}')
    image = folder / "0.png"
    for said, arguments in {
        "empty.txt holds no label": (image, "--labels", folder / "empty.txt"),
        "bad.json is no JSON list": (image, "--labels", folder / "bad.json"),
        "'dog' is there twice": (image, "--labels", folder / "twice.txt"),
        "--top-k": (image, "--labels", folder / "labels.txt", "--top-k", 0),
        "'a picture'": (image, "--labels", folder / "labels.txt", "--template", "a picture"),
        "no image is named": ("--labels", folder / "labels.txt"),
        "missing.txt": (image, "--labels", folder / "missing.txt"),
    }.items():
        with pytest.raises((ValueError, OSError), match=said.replace("(", "")):
            cli._run("classify", COMMAND, ["--model", str(checkpoint[0]), "--dtype", "float32",
                                           *map(str, arguments)])
