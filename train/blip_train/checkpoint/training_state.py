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
from blip_train.steps.pretraining import Pretraining

MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
POINTERS = {"pair": "queue_ptr", "id": "ptr_queue"}  # by the objective's positives: pre-training, retrieval


def export_state(pretraining: Pretraining) -> dict[str, Tensor]:
    """Everything but the model that the published code stores; empty for a step without ITC, which needs none of it."""
    if "itc" not in pretraining.objective.losses:
        return {}
    model, queue = _published(pretraining.model), pretraining.queue
    # The copy has no cross-attention: its features need none. Where the published code stores it, the model's stands.
    copies = model | _published(pretraining.momentum.copy)
    state = {key.replace(".", "_m.", 1): copies[key] for key in model if key.split(".")[0] in MOMENTUM_PARTS}
    state |= {"image_queue": queue.image.T.clone(), "text_queue": queue.text.T.clone(),
              POINTERS[pretraining.objective.positives]: queue.pointer.view(1).clone()}
    if pretraining.objective.positives == "id":
        state["idx_queue"] = queue.ids[None].clone()
    return state


@torch.no_grad()
def restore_state(pretraining: Pretraining, state: dict[str, Tensor]) -> None:
    """The inverse of `export_state`. What `state` does not hold stays as it is, as with the published code's loading.

    Args:
        pretraining: a step with ITC.
        state: from `blip_fast.checkpoint.load_training_state`. A pointer under the name that the other objective gives
            it is left aside, as published.

    Raises:
        ValueError: a part of the momentum copies is missing, or a queue is of another shape.
    """
    momentum = {key.replace("_m.", ".", 1): tensor for key, tensor in state.items() if key.split(".")[0].endswith("_m")}
    if momentum:
        copy = pretraining.momentum.copy
        own, shapes = _published(copy), {name: tensor.shape for name, tensor in copy.state_dict().items()}
        stored = {key: momentum[key] for key in own if key in momentum} | {"temp": own["temp"]}
        copy.load_state_dict(original_layout(copy.config).join(stored, shapes, "the training state's momentum copy"))
    queue = pretraining.queue
    for name, ours in {"image_queue": queue.image.T, "text_queue": queue.text.T, "idx_queue": queue.ids[None],
                       POINTERS[pretraining.objective.positives]: queue.pointer.view(1)}.items():
        if name not in state:
            continue
        if state[name].shape != ours.shape:
            raise ValueError(f"the training state's {name} has shape {list(state[name].shape)} instead of "
                             f"{list(ours.shape)}: set objective.queue_size to its length, or leave it out")
        ours.copy_(state[name])


def _published(model: BlipModel) -> dict[str, Tensor]:
    layout = original_layout(model.config)
    tensors = layout.split(model.state_dict())
    return tensors | layout.stored_twice(tensors)
