"""Captions from Python and from the command line: transformers' tokens and text, any image, resumable
output."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer, until_sep
from PIL import Image

from blip_fast.checkpoint import load_model
from blip_fast.cli import main
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import ImageError, evaluation_transform
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.model_loading import load_for_task

PROMPT = "a picture of"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioning")
    theirs = save_model("BlipForConditionalGeneration", small_tokenizer(), directory, sep_bias=4.0, seed=2)
    return directory, theirs


@pytest.fixture(scope="module")
def captioner(checkpoint) -> Captioner:
    return Captioner.from_pretrained(checkpoint[0], dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures in a tree, one of them broken, and a file that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    (root / "more").mkdir()
    for i in range(12):
        pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("more" if i > 8 else "") / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    (root / "03.png").write_bytes((root / "03.png").read_bytes()[:400])
    (root / "notes.txt").write_text("no picture")
    return root


def pictures(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.*g")) if path.name != "03.png"]


def run(capsys, *arguments) -> tuple[int, list[str], str]:
    status = main(["caption", "--dtype", "float32", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_transformers(checkpoint, captioner, folder, prompt):
    """Token ids are `generate`'s, the caption is what its decoded tokens print."""
    _, theirs = checkpoint
    paths, tokenizer = pictures(folder), captioner.tokenizer
    pixels = evaluation_transform([Image.open(path).convert("RGB") for path in paths], IMAGE_SIZE)
    input_ids = torch.tensor([tokenizer.encode(prompt, "[DEC]")] * len(paths))
    expected = theirs.generate(pixels, input_ids=input_ids, num_beams=3, max_length=20, min_length=5,
                               do_sample=False)
    captions = captioner(paths, prompt, batch_size=4)
    length = input_ids.shape[1] - 1
    assert [c.token_ids for c in captions] == [until_sep(row, tokenizer.sep_id, length) for row in expected]
    assert all(c.caption == tokenizer.decode(c.token_ids) and c.caption.startswith(prompt) for c in captions)
    stripped = captioner(paths[0], prompt, strip_prompt=True)[0]
    assert stripped.caption == tokenizer.decode(stripped.token_ids[length:])
    assert stripped.token_ids == captions[0].token_ids


def test_kinds_of_images(captioner, folder):
    """A path, a string, bytes, a Pillow image and an array are one picture; one image needs no list."""
    path = folder / "01.png"
    with Image.open(path) as image:
        kinds = [path, str(path), path.read_bytes(), image.copy(), np.asarray(image)]
    captions = captioner(kinds)
    assert len({tuple(caption.token_ids) for caption in captions}) == 1
    assert captioner(kinds[3]) == captioner([kinds[4]])
    # scores may round otherwise in another batch
    assert captioner(kinds[3])[0].token_ids == captions[0].token_ids
    assert captioner([]) == []
    with pytest.raises(ImageError, match=r"03\.png"):
        captioner([path, folder / "03.png"])


def test_sampling_depends_on_the_image_alone(captioner, folder):
    """Batch size, order and neighbours leave a sampled caption as it is; the seed does not."""
    paths, config = pictures(folder), GenerationConfig(top_p=0.95, temperature=2.0)

    def written(images, config=config, batch_size=7) -> list[list[int]]:
        return [caption.token_ids for caption in captioner(images, generation=config, batch_size=batch_size)]

    first = written(paths, batch_size=3)
    assert written(paths[::-1])[::-1] == first
    assert written(paths[5]) == [first[5]]
    assert written(paths, GenerationConfig(top_p=0.95, temperature=2.0, seed=1)) != first


def test_training_mode_is_kept(captioner, folder):
    captioner.model.train()
    trained = captioner(folder / "01.png")
    assert captioner.model.training and captioner.model.vision.training
    captioner.model.eval()
    assert trained == captioner(folder / "01.png")


def test_published_checkpoint(data_root, bert_vocabulary):
    """A `.pth` brings no vocabulary: the caller names it; captions are those the published code printed."""
    path = data_root / "original_blip" / "caption.pth"
    captioner = Captioner.from_pretrained(path, tokenizer=bert_vocabulary, dtype="float32")
    notes = json.loads(path.with_suffix(".json").read_text())["generate"]["beam3"]
    with np.load(path.with_name("caption_io.npz")) as arrays:
        images = torch.from_numpy(arrays["images"])
    config = GenerationConfig(beams=3, max_length=20, min_length=5, beam_rule="authors")
    captions = captioner.caption_pixels(images, PROMPT, config, strip_prompt=True)
    assert [c.caption for c in captions] == notes["captions"]


def test_load_for_task(checkpoint, tmp_path):
    directory, _ = checkpoint
    model, _ = load_for_task(directory, dtype="bfloat16", image_size=96)
    assert model.lm_head.bias.dtype == torch.bfloat16 and model.config.vision.image_size == 96
    with pytest.raises(ValueError, match="dtype"):
        load_for_task(directory, dtype="float8")
    with pytest.raises(ValueError, match="device"):
        load_for_task(directory, device="cuda:99", dtype="float32")
    for file in directory.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="tokenizer"):
        load_for_task(tmp_path, dtype="float32")
    for kept in (directory, directory / "vocab.txt", directory / "tokenizer.json"):
        loaded = load_for_task(tmp_path, tokenizer=kept, dtype="float32")[1]
        assert loaded.vocab_size == model.config.text.vocab_size


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoint, tmp_path):
    """Its ids would lie beyond the embeddings, or mean other words: it must not load."""
    Tokenizer([*BERT_TOKENS, *(f"word{i}" for i in range(500))]).save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer has 507 tokens.*do not belong together"):
        load_for_task(checkpoint[0], tokenizer=tmp_path, dtype="float32")


def test_command_prints_json(checkpoint, captioner, folder, capsys):
    """One object per line, in the order of the arguments; the numbers are the library's."""
    paths = pictures(folder)[:3]
    status, lines, _ = run(capsys, "--model", checkpoint[0], "--beams", 3, "--max-length", 20, "--min-length",
                           5, "--prompt", PROMPT, "--dtype", "float32", "--json", *paths)
    rows = [json.loads(line) for line in lines]
    assert status == 0
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, caption in zip(rows, captioner(paths), strict=True):
        assert (row["caption"], row["token_ids"]) == (caption.caption, caption.token_ids)


def test_command_samples(checkpoint, captioner, folder, capsys):
    """--top-p is greedy's companion: it needs no --beams 1."""
    path = pictures(folder)[0]
    _, lines, _ = run(capsys, "--model", checkpoint[0], "--top-p", 0.9, "--seed", 3, "--temperature", 1.5,
                      path)
    expected = captioner(path, generation=GenerationConfig(top_p=0.9, seed=3, temperature=1.5, min_length=5))
    assert lines == [f"{path}\t{expected[0].caption}"]


def test_command_goes_on_after_a_broken_image(checkpoint, folder, capsys):
    """In a folder a broken image costs its own caption, a line on stderr and the exit status."""
    status, lines, err = run(capsys, "--model", checkpoint[0], "--json", "--batch-size", 4, folder)
    rows = {json.loads(line)["image"]: json.loads(line) for line in lines}
    assert status == 1 and len(rows) == 12
    broken = rows.pop(str(folder / "03.png"))
    assert set(broken) == {"image", "error"} and "03.png" in broken["error"]
    assert all({"image", "caption", "token_ids"} <= set(row) for row in rows.values())
    assert "03.png" in err and "1 of 12 images" in err


def test_command_reads_shards(checkpoint, captioner, folder, tmp_path, capsys):
    """The images of a webdataset shard, named SHARD/MEMBER; other records are left alone."""
    shard = tmp_path / "000000.tar"
    paths = pictures(folder)[:3]
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, path.name)
            record = tarfile.TarInfo(f"{path.stem}.json")
            record.size = 2
            tar.addfile(record, io.BytesIO(b"{}"))
    status, lines, _ = run(capsys, "--model", checkpoint[0], "--json", shard)
    rows = [json.loads(line) for line in lines]
    assert status == 0
    assert [row["image"] for row in rows] == [f"{shard}/{path.name}" for path in paths]
    assert [row["token_ids"] for row in rows] == [caption.token_ids for caption in captioner(paths)]


@pytest.mark.parametrize("left", ["whole lines", "a line cut short", "a cut in a character"])
def test_resume(checkpoint, folder, tmp_path, capsys, left):
    """A run that was cut short and resumed leaves the rows of one run, those that were there untouched."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    command = ("--model", checkpoint[0], "--batch-size", 4, folder, "--output")
    assert run(capsys, *command, whole)[:2] == (1, [])
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    tail = {"whole lines": b"", "a line cut short": lines[5][:9],
            "a cut in a character": b'{"image": "caf\xc3'}[left]
    cut.write_bytes(b"".join(lines[:5]) + tail)
    status, _, err = run(capsys, *command, cut, "--resume")
    assert status == 0 and not err, "the broken image is among those already reported"
    assert cut.read_bytes().startswith(b"".join(lines[:5]))
    resumed = [json.loads(line) for line in cut.read_bytes().splitlines()]
    for row, expected in zip(resumed, map(json.loads, lines), strict=True):
        assert (row["image"], row.get("token_ids")) == (expected["image"], expected.get("token_ids"))
    content = cut.read_bytes()
    status, _, err = run(capsys, *command, cut, "--resume")
    assert status == 0 and "nothing left" in err and cut.read_bytes() == content
    status, _, err = run(capsys, *command, cut)
    assert status == 2 and "--resume" in err and cut.read_bytes() == content


def test_resume_from_nothing(checkpoint, folder, tmp_path, capsys):
    """--resume on the first run simply begins; the folder of the file is made."""
    output = tmp_path / "new" / "captions.jsonl"
    path = pictures(folder)[0]
    assert run(capsys, "--model", checkpoint[0], "--output", output, "--resume", path)[0] == 0
    assert [json.loads(line)["image"] for line in output.read_text().splitlines()] == [str(path)]


def test_command_refuses(checkpoint, folder, tmp_path, capsys):
    """Bad input ends with status 2 and one line that names it."""
    directory, image = checkpoint[0], pictures(folder)[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    (tmp_path / "other.jsonl").write_text("not JSON\n{}\n")
    cases = {
        "03.png": (directory, folder / "03.png"),
        "missing.jpg": (directory, image, "missing.jpg"),
        "empty": (directory, tmp_path / "empty"),
        "broken.tar": (directory, tmp_path / "broken.tar"),
        "nowhere": ("nowhere", image),
        "beams": (directory, image, "--beams", 0),
        "max_length": (directory, image, "--max-length", 4, "--min-length", 0),
        "dtype": (directory, image, "--dtype", "float8"),
        "top_p": (directory, image, "--top-p", 0.9, "--beams", 3),
        "--batch-size": (directory, image, "--batch-size", 0),
        "--output": (directory, image, "--resume"),
        "other.jsonl, line 1": (directory, image, "--resume", "--output", tmp_path / "other.jsonl"),
    }
    for named, (model, *rest) in cases.items():
        status, lines, err = run(capsys, "--model", model, *rest)
        assert (status, lines) == (2, []), named
        assert named in err and err.count("\n") == 1, f"{named}: {err}"


def test_needs_a_decoder(tmp_path):
    save_model("BlipForImageTextRetrieval", small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="no text decoder"):
        Captioner(load_model(tmp_path)[0], small_tokenizer())
