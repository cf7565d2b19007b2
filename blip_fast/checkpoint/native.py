"""Our own form: a directory with `config.json`, `model.safetensors` in our parameter names, tokenizer files
and, where there is training state (queues and momentum copies, under their published names),
`training.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_fast.checkpoint.files import naming_config, read_weights, write_json, write_tensors
from blip_fast.checkpoint.names import Stored, native_layout
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig
from blip_fast.model.tokenizer import Tokenizer

MODEL_TYPE = "blip_fast"
TRAINING_FILE = "training.safetensors"


def read(source: str | Path, content: dict[str, Any]) -> Stored:
    """Read a directory or Hub model whose config.json holds `content`."""
    with naming_config(source), torch.device("meta"):
        config = BlipConfig.from_dict({key: value for key, value in content.items() if key != "model_type"})
        names = BlipModel(config).state_dict()
    return Stored(config, native_layout(names), read_weights(source))


def save_native(model: BlipModel, tokenizer: Tokenizer | None, directory: str | Path,
                training_state: dict[str, Tensor] | None = None) -> None:
    """Write a native checkpoint. `training_state` holds queues and momentum copies under their published
    names."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                  directory / "model.safetensors")
    (directory / TRAINING_FILE).unlink(missing_ok=True)
    if training_state:
        write_tensors({name: tensor.contiguous() for name, tensor in training_state.items()},
                      directory / TRAINING_FILE)
    if tokenizer is not None:
        tokenizer.save(directory)
    write_json({"model_type": MODEL_TYPE} | model.config.to_dict(), directory / "config.json")
