"""`blip-fast convert` from the command line."""

import json
from pathlib import Path

import published
import pytest
import torch

from blip_fast.checkpoint import load_model
from blip_fast.cli import main
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A directory with a vocabulary of the synthetic models' size."""
    words = [f"word{i}" for i in range(40 - len(BERT_TOKENS) - 2)]
    Tokenizer([*BERT_TOKENS, *words]).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def fails(capsys, *arguments: object) -> str:
    """Run a conversion that is refused. Returns the one line that it prints."""
    assert convert(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_all_forms_in_a_circle(tmp_path, tokenizer, capsys):
    """original → native → hf → original: the same tensors, and the same tokenizer."""
    path = published.save_kind("matching", tmp_path / "theirs.pth")
    assert convert("--to", "native", path, tmp_path / "native", "--tokenizer", tokenizer) == 0
    assert convert("--to", "hf", tmp_path / "native", tmp_path / "hf", "--json") == 0
    assert convert("--to", "original", tmp_path / "hf", tmp_path / "sub" / "ours.pth") == 0
    human, machine, _ = capsys.readouterr().out.splitlines()
    assert human.endswith("24 px, text encoder, heads contrastive and matching; tokenizer")
    parameters = sum(p.numel() for p in load_model(path)[0].parameters())
    assert json.loads(machine) == {
        "source": str(tmp_path / "native"), "destination": str(tmp_path / "hf"), "form": "hf",
        "parameters": parameters, "image_size": 24, "text_stacks": "encoder",
        "heads": ["contrastive", "matching"], "tokenizer": True, "training_tensors": 0,
    }
    ours, theirs = published.read(tmp_path / "sub" / "ours.pth"), published.read(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = load_model(tmp_path / "sub" / "ours.pth")[1]
    assert found is not None and found.vocab_size == 40


def test_training_state_is_kept_or_dropped_on_request(tmp_path, capsys):
    path = published.save_kind("retrieval", tmp_path / "x.pth")
    assert convert("--to", "native", path, tmp_path / "native") == 0
    assert "tensors of training state" in capsys.readouterr().out
    for source in (path, tmp_path / "native"):
        line = fails(capsys, "--to", "hf", source, tmp_path / "hf")
        assert "holds training state" in line and "add --drop-training-state" in line
    assert not (tmp_path / "hf").exists()
    assert convert("--to", "hf", tmp_path / "native", tmp_path / "hf", "--drop-training-state") == 0
    assert load_model(tmp_path / "hf")[0].config.matching


@pytest.mark.parametrize(("task", "architecture"), [
    ("caption", "BlipForConditionalGeneration"), ("match", "BlipForImageTextRetrieval")])
def test_one_task_of_a_pretrained_model(tmp_path, capsys, task, architecture):
    """transformers has no class for the whole model; the parts of one task have the same weights."""
    path = published.save_kind("pretraining", tmp_path / "x.pth")
    arguments = ("--to", "hf", path, tmp_path / "hf", "--drop-training-state")
    assert "transformers has no BLIP class" in fails(capsys, *arguments)
    assert convert(*arguments, "--task", task) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [architecture]
    whole, part = load_model(path)[0], load_model(tmp_path / "hf")[0]
    mode = "decoder" if task == "caption" else "encoder"
    for layer in range(2):
        for name, tensor in part.stack(mode).layers[layer].state_dict().items():
            assert torch.equal(tensor, whole.stack(mode).layers[layer].state_dict()[name]), name


def test_image_size(tmp_path, capsys):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    assert convert("--to", "native", path, tmp_path / "native", "--image-size", 48) == 0
    assert "48 px" in capsys.readouterr().out
    assert load_model(tmp_path / "native")[0].vision.position_embeds.shape == (37, 24)
    assert "vision.patch_size (8) must divide vision.image_size (50)" in fails(
        capsys, "--to", "native", path, tmp_path / "other", "--image-size", 50)


def test_bad_input_is_one_line(tmp_path, capsys):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    (tmp_path / "broken.pth").write_bytes(path.read_bytes()[:5000])
    assert "no such file" in fails(capsys, "--to", "hf", tmp_path / "nowhere.pth", tmp_path / "hf")
    assert "broken.pth is no whole checkpoint" in fails(
        capsys, "--to", "hf", tmp_path / "broken.pth", tmp_path / "hf")
    assert "exists already" in fails(capsys, "--to", "native", path, tmp_path)
    assert "invalid choice: 'onnx'" in fails(capsys, "--to", "onnx", path, tmp_path / "onnx")
    assert "holds neither tokenizer.json nor vocab.txt" in fails(
        capsys, "--to", "hf", path, tmp_path / "hf", "--tokenizer", tmp_path)
    path.with_suffix(".json").unlink()
    assert "--heads" in fails(capsys, "--to", "hf", path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_existing_destinations_are_not_overwritten(tmp_path, capsys):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    before = path.read_bytes()
    assert f"{path} exists already" in fails(capsys, "--to", "original", path, path)
    assert path.read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert convert("--to", "native", path, tmp_path / "empty") == 0
    capsys.readouterr()
    assert f"{tmp_path / 'empty'} exists already" in fails(capsys, "--to", "native", path, tmp_path / "empty")
