"""Checkpoints that are broken, foreign or malicious: one clear error, and nothing run or half written."""

import json
import os
from pathlib import Path

import published
import pytest
import safetensors.torch
import torch
from published import convert, weights
from torch import Tensor

from blip_fast.checkpoint import load_model, load_training_state, save_hugging_face
from blip_fast.checkpoint.files import whole_file
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer


@pytest.fixture(params=published.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def hf(tmp_path) -> Path:
    return convert(published.save_kind("captioning", tmp_path / "x.pth"), "hf", tmp_path / "hf")


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                                directory / "model.safetensors")


def change_config(directory: Path, **changes) -> None:
    content = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        part, _, key = key.rpartition("__")
        (content[part] if part else content)[key] = value
    (directory / "config.json").write_text(json.dumps(content))


def test_missing_extra_and_misshapen_keys_are_named(kind, tmp_path):
    """All of them in one sentence, in the file's own names."""
    path = published.save_kind(kind, tmp_path / "x.pth")
    state = published.read(path)
    stack = "text_decoder.bert" if kind == "captioning" else "text_encoder"
    missing, misshapen = f"{stack}.encoder.layer.1.attention.self.key.bias", "visual_encoder.norm.weight"
    del state[missing]
    state |= {misshapen: torch.zeros(5), "stranger.weight": torch.zeros(1)}
    width = 16 if kind == "reasoning" else 24
    with pytest.raises(ValueError, match=rf"x\.pth.*missing: {missing}; unexpected: stranger.weight; "
                                         r"misshapen: "
                                         rf"{misshapen} \[5\] instead of \[{width}\]"):
        load_model(published.save(state, path, published.DEEP if kind == "reasoning" else published.SIZES))


def test_native_and_transformers_keys_are_named_alike(hf, tmp_path):
    native = convert(hf, "native", tmp_path / "native")
    for directory, name in ((hf, "vision_model.post_layernorm.bias"), (native, "vision.norm.bias")):
        tensors = weights(directory)
        tensors["stranger"] = tensors.pop(name)
        rewrite(directory, tensors)
        with pytest.raises(ValueError, match=f"missing: {name}; unexpected: stranger"):
            load_model(directory)


def test_many_faults_are_counted(tmp_path):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    state = {name: tensor for name, tensor in published.read(path).items() if ".blocks.1." not in name
             or name.endswith("norm1.weight")}
    with pytest.raises(ValueError, match=r"missing: (visual_encoder\S+, ){4}\S+ and 6 more$"):
        load_model(published.save(state, path))


@pytest.mark.parametrize(("change", "message"), [
    ({"text_decoder.cls.predictions.decoder.bias": torch.ones(40)},
     "decoder.bias differs from .*predictions.bias"),
    ({"text_decoder.bert.embeddings.position_ids": torch.arange(12)[None] + 1}, "must count from 0 to 11"),
    ({"visual_encoder.pos_embed": torch.zeros(10, 24)}, r"pos_embed \[10, 24\] must have 3 axes"),
    ({"visual_encoder.pos_embed": torch.zeros(1, 11, 24)},
     r"pos_embed \[1, 11, 24\] instead of \[1, 10, 24\]"),
])
def test_values_that_contradict(tmp_path, change, message):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_model(published.save(published.read(path) | change, path))


@pytest.mark.parametrize(("change", "message"), [
    ({"visual_encoder_m.stranger": torch.ones(1)}, "visual_encoder_m.stranger is a copy of no tensor"),
    ({"vision_proj_m.bias": torch.ones(5)}, r"vision_proj_m.bias has shape \[5\] instead of \[6\]"),
])
def test_training_state_that_does_not_fit(tmp_path, change, message):
    path = published.save_kind("pretraining", tmp_path / "x.pth")
    published.save(published.read(path) | change, path)
    model, _ = load_model(path)  # the model itself is whole
    with pytest.raises(ValueError, match=message):
        load_training_state(path, model.config)


class Code:
    """Unpickling it would run a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_pickle_with_code_is_refused(tmp_path, hf):
    trace = tmp_path / "it-ran"
    torch.save({"model": {"visual_encoder.norm.weight": Code(trace)}}, tmp_path / "x.pth")
    (hf / "model.safetensors").unlink()
    torch.save({"vision_model.post_layernorm.weight": Code(trace)}, hf / "pytorch_model.bin")
    for source in (tmp_path / "x.pth", hf):
        with pytest.raises(ValueError, match="holds pickled Python objects besides tensors: refused"):
            load_model(source)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x05\x06" + bytes(18), bytes(1000)],
                         ids=["empty", "html", "empty_zip", "zeros"])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth is no whole checkpoint that torch.save wrote"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize(("content", "message"), [
    ([1], "must hold {'model': state dict}"),
    ({"state_dict": {}}, "must hold {'model': state dict}"),
    ({"model": {}}, "holds no state dict"),
    ({"model": {"epoch": 3}}, "'epoch' is no tensor"),
    ({"model": {"layer1.weight": torch.zeros(1)}}, "neither a text encoder nor a text decoder"),
    ({"model": {"text_encoder.x": torch.zeros(1)}}, "missing: visual_encoder.pos_embed"),
])
def test_pickles_that_are_no_blip_checkpoint(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "x.pth")


def test_truncated_files(tmp_path, hf):
    path = published.save_kind("pretraining", tmp_path / "y.pth")
    for damaged, source in ((path, path), (hf / "model.safetensors", hf)):
        whole = damaged.read_bytes()
        for length in (len(whole) // 2, len(whole) - 1, len(whole) // 20, 4):
            damaged.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{damaged.name} is no whole"):
                load_model(source)


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["BlipModel"]}, "config.json names BlipModel: one of BlipForConditionalGeneration"),
    ({"architectures": None}, "config.json names no class"),
    ({"model_type": "clip"}, "config.json is of a 'clip' model"),
    ({"text_config__hidden_act": "relu"}, "text_config.hidden_act is 'relu'"),
    ({"vision_config__image_size": [24, 32]},
     r"image_size is \[24, 32\]: BLIP's images and patches are square"),
    ({"text_config__num_attention_heads": 3}, r"text.heads \(3\) must divide text.width \(16\)"),
    ({"vision_config__hidden_size": "wide"}, "the config does not describe a BLIP model"),
    ({"text_config__vocab_size": 50}, r"misshapen: text_decoder.cls.predictions.bias \[40\] instead of "
                                      r"\[50\]|"
                                      r"word_embeddings.weight \[40, 16\] instead of \[50, 16\]"),
    ({"text_config__vocab_size": 20}, "text.vocab_size 20 does not hold the special token id 39"),
])
def test_transformers_configs_that_do_not_fit(hf, change, message):
    change_config(hf, **change)
    with pytest.raises(ValueError, match=message):
        load_model(hf)


def test_directories_without_what_is_needed(tmp_path, hf):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"heads is for a published \.pth"):
        load_model(hf, heads=2)
    (hf / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: none of model\.safetensors"):
        load_model(hf)
    (hf / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(hf)
    (hf / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(hf)


def test_a_tokenizer_with_more_tokens_than_the_model(hf):
    tokenizer = Tokenizer([*BERT_TOKENS, *(f"word{i}" for i in range(40))])
    with pytest.raises(ValueError, match="tokenizer has 47 tokens, the model embeddings for 40"):
        load_model(hf, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["pretraining", "reasoning"])
def test_transformers_has_no_class_for_it(kind, tmp_path):
    """The error comes before anything is written."""
    model, _ = load_model(published.save_kind(kind, tmp_path / "x.pth"))
    parts = {"pretraining": "'tied' and contrastive and matching",
             "reasoning": "'encoder' and reasoning"}[kind]
    with pytest.raises(ValueError, match=f"no BLIP class for a model with text_stacks={parts} heads"):
        save_hugging_face(model, None, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as partial:
        partial.write_text("half of the ne")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
