"""Synthetic checkpoints of every published kind: noisy textbook models, saved as `.pth`."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from reference.model import Sizes
from reference.pretraining import TextbookPretraining
from reference.tasks import Captioner, Matcher, PairReasoner, QuestionAnswerer
from torch import Tensor, nn

from blip_fast.checkpoint import load_model, load_training_state, save_hugging_face, save_native, save_original

SIZES = Sizes(image_size=24, patch_size=8, vision_width=24, vision_layers=2, vision_heads=3, vocabulary=40,
              positions=12, text_width=16, text_layers=2, text_heads=2, text_feed_forward=20, projection=6)
DEEP = Sizes(image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
             vocabulary=40, positions=9, text_width=16, text_layers=8, text_heads=2, text_feed_forward=20)
SPECIAL_TOKENS = {"pad": 0, "cls": 1, "sep": 2, "bos": 38, "enc": 39}

KINDS = {
    "captioning": lambda: Captioner(SIZES),
    "matching": lambda: Matcher(SIZES),
    "answering": lambda: QuestionAnswerer(SIZES),
    "pretraining": lambda: TextbookPretraining(SIZES, queue_length=7),
    "retrieval": lambda: TextbookPretraining(SIZES, queue_length=5, decoder=False, retrieval=True),
    "reasoning": lambda: PairReasoner(DEEP),
}


def make(kind: str, seed: int = 0) -> nn.Module:
    """A textbook model with noise on every parameter."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(state: dict[str, Tensor], path: Path, sizes: Sizes = SIZES) -> Path:
    """Write a `.pth` as published, and the JSON next to it with what the shapes do not tell."""
    torch.save({"model": state}, path)
    path.with_suffix(".json").write_text(json.dumps({
        "text_config": {"num_attention_heads": sizes.text_heads},
        "vit_config": {"num_heads": sizes.vision_heads}, "special_tokens": SPECIAL_TOKENS}))
    return path


def save_kind(kind: str, path: Path) -> Path:
    return save(make(kind).state_dict(), path, DEEP if kind == "reasoning" else SIZES)


def read(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def weights(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that names, dtypes and values are equal, bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def convert(source: Path, to: str, destination: Path) -> Path:
    model, tokenizer = load_model(source, dtype=None)
    state = load_training_state(source, model.config)
    if to == "original":
        save_original(model, tokenizer, destination, state)
    elif to == "native":
        save_native(model, tokenizer, destination, state)
    else:
        assert not state
        save_hugging_face(model, tokenizer, destination)
    return destination
