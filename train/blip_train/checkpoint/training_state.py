"""A run's training state under its published names: momentum copies (`visual_encoder_m.…`) and the queue.

| ours                | published                | shape of theirs        |
|---------------------|--------------------------|------------------------|
| `momentum.copy`     | `visual_encoder_m.…` etc | as the model's own     |
| `queue.image, text` | `image_queue, text_queue`| [embed_dim, size]      |
| `queue.ids`         | `idx_queue`, retrieval   | [1, size]              |
| `queue.pointer`     | see `POINTERS`           | [1]                    |
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip_fast.checkpoint.names import original_layout
from blip_fast.model.blip import BlipModel
from blip_train.steps.step import TrainingStep

MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
POINTERS = {False: "queue_ptr", True: "ptr_queue"}  # by `MomentumState.by_id`: pre-training, retrieval


def export_state(step: TrainingStep) -> dict[str, Tensor]:
    """Everything that the published code stores besides the model; empty for a
    step without momentum state."""
    own = step.momentum_state()
    if own is None:
        return {}
    model, queue = _published_tensors(step.model), own.queue
    # The copy has no cross-attention, because its features need none. Where the published code
    # stores one, it is the model's.
    copies = model | _published_tensors(own.encoders.copy)
    state = {key.replace(".", "_m.", 1): copies[key] for key in model if key.split(".")[0] in MOMENTUM_PARTS}
    state |= {"image_queue": queue.image.T.clone(), "text_queue": queue.text.T.clone(),
              POINTERS[own.by_id]: queue.pointer.view(1).clone()}
    if own.by_id:
        state["idx_queue"] = queue.ids[None].clone()
    return state


@torch.no_grad()
def restore_state(step: TrainingStep, state: dict[str, Tensor]) -> None:
    """The inverse of `export_state`. What `state` lacks is left unchanged, as in the published code.

    Args:
        step: a step with momentum state.
        state: from `blip_fast.checkpoint.load_training_state`. A pointer under the other objective's
            name is ignored, as published.

    Raises:
        ValueError: a part of the momentum copies is missing, or a queue has another shape.
    """
    own = step.momentum_state()
    assert own is not None
    momentum = {key.replace("_m.", ".", 1): tensor for key, tensor in state.items()
                if key.split(".")[0].endswith("_m")}
    if momentum:
        copy = own.encoders.copy
        plain, shapes = _published_tensors(copy), {name: tensor.shape
                                                   for name, tensor in copy.state_dict().items()}
        stored = {key: momentum[key] for key in plain if key in momentum} | {"temp": plain["temp"]}
        copy.load_state_dict(original_layout(copy.config).join(stored, shapes,
                                                               "the training state's momentum copy"))
    queue = own.queue
    for name, ours in {"image_queue": queue.image.T, "text_queue": queue.text.T, "idx_queue": queue.ids[None],
                       POINTERS[own.by_id]: queue.pointer.view(1)}.items():
        if name not in state:
            continue
        if state[name].shape != ours.shape:
            raise ValueError(f"the training state's {name} has shape {list(state[name].shape)} instead of "
                             f"{list(ours.shape)}: set objective.queue_size to its length, or leave it out")
        ours.copy_(state[name])


def _published_tensors(model: BlipModel) -> dict[str, Tensor]:
    layout = original_layout(model.config)
    tensors = layout.split(model.state_dict())
    return tensors | layout.stored_twice(tensors)
