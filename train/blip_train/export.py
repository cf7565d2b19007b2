"""A run's checkpoint as a model. One process without a process group assembles it from its shards, whatever
number of ranks and ZeRO stage wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig
from blip_fast.model.tokenizer import Tokenizer
from blip_train.adapters import adapt, merged
from blip_train.checkpoint.checkpoints import read_written, whole
from blip_train.checkpoint.reshard import whole_weights
from blip_train.checkpoint.training_state import export_state
from blip_train.engine.environment import rank_environment
from blip_train.prepare import TOKENIZER, make_step
from blip_train.recipe import load_recipe
from blip_train.steps.step import TrainingStep


def read_checkpoint(run: Path, step: int | None) -> tuple[TrainingStep, Tokenizer]:
    """The training step of a run as a checkpoint holds it (model, momentum copy, queue), and the run's
    tokenizer. Adapters are merged into the model; the momentum copy keeps its own.

    Args:
        run: a run's directory, `runs/NAME`.
        step: the checkpoint's step; None: the newest.

    Raises:
        ValueError: the run has no checkpoint, or none of that step.
    """
    folders = {int(folder.name.removeprefix("step-")): folder for folder in whole(run / "checkpoints")}
    if not folders:
        raise ValueError(f"{run} holds no checkpoint: name the directory of a run (runs/NAME) that has saved "
                         "one")
    if step is not None and step not in folders:
        raise ValueError(f"{run} holds no checkpoint of step {step}: choose one of "
                         f"{', '.join(map(str, folders))}")
    folder = folders[max(folders) if step is None else step]
    written = read_written(folder)
    os.environ.update(rank_environment())  # for DeepSpeed, whose objects are in the files
    state = whole_weights(folder, written.zero_stage)
    recipe = load_recipe(run / "recipe.yaml")
    with torch.device("meta"):
        trained = make_step(BlipModel(BlipConfig.from_dict(written.model)), recipe)
        if recipe.adapters is not None:
            adapt(trained, recipe.adapters)
    trained.load_state_dict(state, assign=True)
    if recipe.adapters is not None:
        trained.model = merged(trained.model)
    return trained.eval(), Tokenizer.from_pretrained(run / TOKENIZER)


def training_state(trained: TrainingStep) -> dict[str, Tensor]:
    """Momentum copies and queue under their published names.

    Raises:
        ValueError: the run trains without ITC and so has neither, or with adapters,
            which have no published names.
    """
    adapters = any(".lora_" in name for name, _ in trained.named_parameters())
    state = {} if adapters else export_state(trained)
    if not state:
        raise ValueError("the run's objective has no itc, so no momentum copies and no queue, or the run "
                         "trains adapters: leave out --training-state")
    return state
