"""Checkpoints: round trips between the three forms, every published kind, and variants in the wild."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import published
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from published import assert_same, convert, weights
from reference.tasks import twin_state

from blip_fast.checkpoint import (
    load_model,
    load_training_state,
    reasoning_model,
    save_hugging_face,
    save_native,
    save_original,
)
from blip_fast.checkpoint.names import original_layout
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.model.vision import resize_positions

STACKS = {"captioning": "decoder", "matching": "encoder", "answering": "untied", "pretraining": "tied",
          "retrieval": "encoder", "reasoning": "encoder"}
HELD_BY_TRANSFORMERS = ("captioning", "matching", "answering")


@pytest.fixture(params=published.KINDS)
def kind(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------------------- round trips


def test_original_to_native_and_back(kind, tmp_path):
    """Every tensor of the file, queues and momentum copies included, comes back bit for bit."""
    path = published.save_kind(kind, tmp_path / "theirs.pth")
    native = convert(path, "native", tmp_path / "native")
    assert_same(published.read(convert(native, "original", tmp_path / "ours.pth")), published.read(path))


def test_native_to_original_and_back(kind, tmp_path):
    """The config too: what a `.pth` does not say is in the JSON next to it."""
    native = convert(published.save_kind(kind, tmp_path / "theirs.pth"), "native", tmp_path / "native")
    again = convert(convert(native, "original", tmp_path / "ours.pth"), "native", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (native / name).read_bytes()
    assert (again / "training.safetensors").exists() == (kind in ("pretraining", "retrieval"))


@pytest.mark.parametrize("kind", HELD_BY_TRANSFORMERS)
def test_through_transformers_and_back(kind, tmp_path):
    path = published.save_kind(kind, tmp_path / "theirs.pth")
    directory = convert(path, "hf", tmp_path / "hf")
    native = convert(directory, "native", tmp_path / "native")
    assert_same(published.read(convert(native, "original", tmp_path / "ours.pth")), published.read(path))
    again = convert(native, "hf", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes()


def test_a_learned_temperature_survives_transformers(tmp_path):
    """It knows none, so config.json carries it; and one that was never trained is not invented."""
    state = published.make("matching").state_dict() | {"temp": torch.tensor(0.0123456789)}
    path = published.save(state, tmp_path / "theirs.pth")
    directory = convert(path, "hf", tmp_path / "hf")
    assert_same(published.read(convert(directory, "original", tmp_path / "ours.pth")), state)


def test_half_precision_round_trip(tmp_path):
    state = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor
             for name, tensor in published.make("captioning").state_dict().items()}
    path = published.save(state, tmp_path / "theirs.pth")
    directory = convert(path, "hf", tmp_path / "hf")
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(published.read(convert(directory, "original", tmp_path / "ours.pth")), state)
    assert {p.dtype for p in load_model(directory)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(directory, dtype=torch.float16)[0].parameters()} == {torch.float16}


def test_tokenizer_goes_along(tmp_path):
    """Its special tokens are the model's where the file does not name them."""
    tokenizer = Tokenizer([*BERT_TOKENS, *(f"word{i}" for i in range(40 - len(BERT_TOKENS) - 2))])
    path = published.save_kind("captioning", tmp_path / "theirs.pth")
    path.with_suffix(".json").unlink()
    model, _ = load_model(path, tokenizer=tokenizer, heads=1)
    assert (model.config.tokens.bos, model.config.tokens.cls) == (tokenizer.bos_id, tokenizer.cls_id)
    save_original(model, tokenizer, tmp_path / "ours.pth")
    save_native(model, tokenizer, tmp_path / "native")
    save_hugging_face(model, tokenizer, tmp_path / "hf")
    for name in ("ours.pth", "native", "hf"):
        again, found = load_model(tmp_path / name)
        assert again.config == model.config
        assert found is not None and found.encode("word3") == tokenizer.encode("word3")


# ------------------------------------------------------------------------------------- kinds and their parts


def test_parts_are_recognised(kind, tmp_path):
    config = load_model(published.save_kind(kind, tmp_path / "x.pth"))[0].config
    assert config.text_stacks == STACKS[kind]
    assert config.contrastive == config.matching == (kind in ("matching", "pretraining", "retrieval"))
    assert config.reasoning == config.text.twin_cross_attention == (kind == "reasoning")
    assert (config.vision.image_size, config.vision.patch_size) == ((16, 8) if kind == "reasoning"
                                                                    else (24, 8))


def test_stacks_that_differ_in_one_number_are_untied(tmp_path):
    state = {name: tensor.clone() for name, tensor in published.make("pretraining").state_dict().items()}
    state["text_decoder.bert.encoder.layer.1.output.dense.bias"][3] += 1
    # An untied decoder reads states of the text's width; make the image's rows as wide.
    for name in list(state):
        if name.startswith("text_decoder") and name.endswith(("crossattention.self.key.weight",
                                                              "crossattention.self.value.weight")):
            state[name] = state[name][:, :16]
    model, _ = load_model(published.save(state, tmp_path / "x.pth"))
    assert model.config.text_stacks == "untied"
    assert model.text["decoder"].layers[1].feed_forward.mlp_out.bias[3] != \
        model.text["encoder"].layers[1].feed_forward.mlp_out.bias[3]


def test_heads_from_option_json_or_width(tmp_path):
    path = published.save_kind("captioning", tmp_path / "x.pth")
    assert (load_model(path)[0].config.vision.heads, load_model(path)[0].config.text.heads) == (3, 2)
    assert load_model(path, heads=4)[0].config.vision.heads == 4  # the option has the last word
    stored = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({"special_tokens": stored["special_tokens"]}))
    with pytest.raises(ValueError, match=r"vision width 24 is no multiple of 64.*--heads, or x.json"):
        load_model(path)


@torch.no_grad()
def test_reasoning_model_computes_as_the_textbook(tmp_path):
    """Eight layers: the twins averaged in the first six, merged by a linear layer in the last two."""
    textbook = published.make("reasoning").eval()
    model, _ = load_model(published.save_kind("reasoning", tmp_path / "x.pth"))
    torch.manual_seed(1)
    pairs = torch.randn(2, 3, 3, 16, 16)
    texts = PackedTexts.from_lists([[39, 5, 6, 7, 2], [39, 2], [39, 9, 30, 2]])
    stack = model.stack("encoder")
    kv = stack.image_kv(*(model.encode_images(images) for images in pairs))
    (rows,) = stack([TextStream(texts, "encoder", torch.arange(3), first_row_only=True)], kv)
    textbook_texts, mask = texts.to_padded(0)
    states = tuple(textbook.visual_encoder(images) for images in pairs)
    expected = textbook.cls_head(textbook.text_encoder(textbook_texts, mask.long(), states)[:, 0])
    torch.testing.assert_close(model.reasoning_head(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pretraining", "matching"])
def test_an_ordinary_checkpoint_starts_nlvr2(kind, tmp_path):
    """Both twins are copies of the one cross-attention, as in the published code; what is new comes from the
    seed."""
    textbook = published.make(kind)
    model, _ = load_model(published.save_kind(kind, tmp_path / "x.pth"))
    twins = reasoning_model(model, seed=3)
    ours = original_layout(twins.config).split(twins.state_dict())
    expected = {name: tensor for name, tensor in twin_state(textbook.state_dict()).items() if name in ours}
    new = ours.keys() - expected.keys()
    assert new == {f"cls_head.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert_same({name: ours[name] for name in expected}, expected)
    assert torch.equal(twins.reasoning_head[0].weight,
                       reasoning_model(model, seed=3).reasoning_head[0].weight)
    assert not torch.equal(twins.reasoning_head[0].weight,
                           reasoning_model(model, seed=4).reasoning_head[0].weight)
    with pytest.raises(ValueError, match="image-grounded text encoder"):
        reasoning_model(load_model(published.save_kind("captioning", tmp_path / "y.pth"))[0], seed=0)


def test_files_as_the_published_training_loop_writes_them(tmp_path):
    """The file also holds optimiser, recipe and epoch."""
    path = published.save_kind("pretraining", tmp_path / "x.pth")
    model, state = published.make("pretraining"), published.read(path)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    torch.save({"model": state, "optimizer": optimizer.state_dict(),
                "config": {"queue_size": 7, "vit": "base"}, "epoch": 3}, path)
    assert_same(published.read(convert(path, "original", tmp_path / "ours.pth")), state)


def test_positions_are_resized_in_model_and_momentum_copy(tmp_path):
    path = published.save_kind("pretraining", tmp_path / "x.pth")
    state = published.read(path)
    model, _ = load_model(path, image_size=40)
    assert model.config.vision.image_size == 40
    resized = resize_positions(state["visual_encoder.pos_embed"][0], 26)
    assert torch.equal(model.vision.position_embeds, resized)
    momentum = load_training_state(path, model.config)["visual_encoder_m.pos_embed"]
    assert torch.equal(momentum[0], resize_positions(state["visual_encoder_m.pos_embed"][0], 26))
    assert model.encode_images(torch.randn(1, 3, 40, 40)).shape == (1, 26, 24)


def test_loaded_model_is_ready(tmp_path):
    """In evaluation mode, trainable, every parameter in memory of its own."""
    model, _ = load_model(published.save_kind("pretraining", tmp_path / "x.pth"))
    assert not model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    storages = [p.untyped_storage() for p in model.parameters()]
    assert all(s.nbytes() == p.numel() * 4 for s, p in zip(storages, model.parameters(), strict=True))


def test_saving_where_one_loaded_from(tmp_path):
    """The model owns its memory: writing over the files that it was read from changes nothing in it."""
    native = convert(published.save_kind("pretraining", tmp_path / "x.pth"), "native", tmp_path / "native")
    model, _ = load_model(native)
    state = load_training_state(native, model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_native(model, None, native, state)
    shutil.rmtree(native)
    assert_same(dict(model.state_dict()), before)


# ------------------------------------------------------------------------- variants of transformers' layout


@pytest.fixture
def hf(tmp_path) -> Path:
    return convert(published.save_kind("captioning", tmp_path / "x.pth"), "hf", tmp_path / "hf")


def test_old_pickled_weights_with_buffers_and_copies(hf):
    """Checkpoints of 2023: position ids stored, the vocabulary head's weight and bias stored a second
    time."""
    expected, tensors = load_model(hf)[0].state_dict(), weights(hf)
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    tensors |= {
        "text_decoder.bert.embeddings.position_ids": torch.arange(12)[None],
        "text_decoder.cls.predictions.decoder.weight": tensors[words],
        "text_decoder.cls.predictions.decoder.bias": tensors["text_decoder.cls.predictions.bias"],
    }
    (hf / "model.safetensors").unlink()
    torch.save(tensors, hf / "pytorch_model.bin")
    assert_same(load_model(hf)[0].state_dict(), expected)
    del tensors[words]  # either of the two names is enough
    torch.save(tensors, hf / "pytorch_model.bin")
    assert_same(load_model(hf)[0].state_dict(), expected)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(hf, suffix):
    expected, tensors = load_model(hf)[0].state_dict(), weights(hf)
    (hf / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {name: f"{stem}-{i % 2}.{suffix}" for i, name in enumerate(tensors)}
    for shard in set(index.values()):
        part = {name: tensor for name, tensor in tensors.items() if index[name] == shard}
        if suffix == "safetensors":
            safetensors.torch.save_file(part, hf / shard)
        else:
            torch.save(part, hf / shard)
    (hf / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(load_model(hf)[0].state_dict(), expected)
    (hf / f"{stem}-1.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"lists {stem}-1.{suffix}, which is missing"):
        load_model(hf)


def test_missing_config_keys_are_transformers_defaults(hf):
    """Not ours: eight text heads, a norm eps of 1e-5 in the vision transformer, no dropout."""
    content = json.loads((hf / "config.json").read_text())
    for key in ("num_attention_heads", "hidden_dropout_prob"):
        del content["text_config"][key]
    del content["vision_config"]["layer_norm_eps"]
    (hf / "config.json").write_text(json.dumps(content))
    config = load_model(hf)[0].config
    assert (config.text.heads, config.text.dropout, config.vision.norm_eps) == (8, 0.0, 1e-5)


def test_model_of_the_hub(hf, monkeypatch):
    def download(model: str, name: str) -> str:
        if model == "someone/away":
            raise LocalEntryNotFoundError("no connection")
        if model == "someone/unknown":
            raise RepositoryNotFoundError("no such model",
                                          response=type("R", (), {"headers": {}, "request": None})())
        if not (hf / name).is_file():
            raise EntryNotFoundError(name)
        return str(hf / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(load_model("someone/captioner")[0].state_dict(), load_model(hf)[0].state_dict())
    with pytest.raises(FileNotFoundError, match=r"someone/away: no such directory, and the Hub.* cannot be "
                                                r"reached"):
        load_model("someone/away")
    with pytest.raises(FileNotFoundError, match="someone/unknown: no such directory, and no public model"):
        load_model("someone/unknown")
