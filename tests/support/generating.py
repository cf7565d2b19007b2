"""Helpers for tests of generation: a small model that transformers loads too, images of noise, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from torch import Tensor

from blip_fast.checkpoint import load_model
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageKV, ImageStates, image_states


def small_models(directory: Path) -> tuple[Any, BlipModel]:
    """transformers' captioner and ours, with the same weights."""
    theirs = save_model("BlipForConditionalGeneration", small_tokenizer(), directory, sep_bias=4.0, seed=2)
    return theirs, load_model(directory)[0]


def see(model: BlipModel, pixels: Tensor) -> ImageStates:
    with torch.no_grad():
        return image_states(model.encode_images(pixels))


def keys_and_values(model: BlipModel, seen: ImageStates) -> ImageKV:
    with torch.no_grad():
        return model.stack("decoder").states_kv(seen.rows, offsets=seen.offsets)


def prompts_of(prompt: list[int], images: int) -> list[list[int]]:
    return [prompt] * images


def noise(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
