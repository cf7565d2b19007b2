"""The same weights for ours and for transformers: a directory that both load."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_bench import words
from blip_fast.checkpoint import load_model, save_hugging_face
from blip_fast.model.blip import BlipModel, task_model
from blip_fast.model.config import TASK_PARTS, BlipConfig, VisionConfig

SEED = 0
TOKENS = 20  # of a caption, the prompt included


def random_model(part: str, image_size: int) -> BlipModel:
    """BLIP base with the parts of one of `TASK_PARTS`, and random weights from `SEED`."""
    torch.manual_seed(SEED)
    return BlipModel(BlipConfig(vision=VisionConfig(image_size=image_size), **TASK_PARTS[part])).eval()


def write_checkpoint(directory: Path, part: str, image_size: int, source: str | None = None) -> None:
    """Write the weights of `part` (one of `TASK_PARTS`) in float32 with a tokenizer: from the checkpoint
    `source`, or random ones of the base size. Raises ValueError if `source` has no such part."""
    if source is None:
        save_hugging_face(random_model(part, image_size), words.tokenizer(), directory)
        return
    model, tokenizer = load_model(source, image_size=image_size)
    if tokenizer is None:
        raise ValueError(f"{source} brings no tokenizer: store one with `blip-fast convert --tokenizer`")
    save_hugging_face(task_model(model, part), tokenizer, directory)


def part_for_encoding(source: str | None) -> str:
    """One of `TASK_PARTS` that the checkpoint contains; all of them have the vision encoder."""
    if source is None:
        return "caption"
    stacks = load_model(source)[0].config.text_stacks
    return {"untied": "answer", "encoder": "match"}.get(stacks, "caption")


def load_transformers(directory: Path, dtype: str) -> Any:
    """The transformers model in a directory."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def transformers_models(directory: Path, dtypes: Sequence[str], peers: Collection[str]) -> dict[str, Any]:
    """transformers' models by name, one per dtype that it supports; none if it is not among `peers`."""
    return {f"transformers {dtype}": load_transformers(directory, dtype) for dtype in dtypes
            if dtype != "int8" and "transformers" in peers}


def pictures(number: int, image_size: int) -> Tensor:
    """Noise in place of transformed pictures, float32 [number, 3, image_size, image_size]: the content does
    not change the cost."""
    return torch.randn(number, 3, image_size, image_size, generator=torch.Generator().manual_seed(SEED))
