"""What the engine trains, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_train.steps.momentum import MomentumEncoders
from blip_train.steps.queue import KeyQueue


@dataclass(frozen=True)
class StepContext:
    """What an optimiser step's place in the run means for its batches. A step reads what concerns its losses.

    Attributes:
        alpha: share of ITC's soft targets.
        language_only: compute LM alone; momentum copy's features and queue are not used.
    """

    alpha: float = 0.0
    language_only: bool = False


class Negatives(NamedTuple):
    """Indices into the candidates (the rank's batch, or all ranks' batches): int64
    [batch], −1 where there is none."""

    image_for_text: Tensor
    text_for_image: Tensor


class StepOutput(NamedTuple):  # a tuple, because ZeRO 3 looks for tensors in what a module returns
    """What a batch computed. `losses` are scalars with gradients."""

    losses: dict[str, Tensor]
    negatives: Negatives | None = None
    # For the queue: momentum features (image, text) and ids.
    keys: tuple[Tensor, Tensor, Tensor] | None = None
    exchanged: tuple[int, int] | None = None  # visual tokens: bytes fetched, bytes an all-gather would move

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class MomentumState(NamedTuple):
    """What a step keeps besides its model. `by_id`: pairs with equal ids count as positives (retrieval)."""

    encoders: MomentumEncoders
    queue: KeyQueue
    by_id: bool


class TrainingStep(nn.Module):
    """A model and the losses of a batch: `forward(batch, context) -> StepOutput`, the latter a `StepContext`.

    `table.py` lists the steps. Their attribute names are the keys of checkpoints.
    """

    model: BlipModel

    def follow(self) -> None:
        """Called once per optimiser step, before its first batch."""

    def enqueue(self, *outputs: StepOutput) -> None:
        """Called once per optimiser step, after its last backward, with the outputs of all its batches."""

    def momentum_state(self) -> MomentumState | None:
        """The momentum copy and queue; None for a step without."""
        return None

    def log_fields(self, output: StepOutput) -> dict[str, float]:
        """What the run's log says of a batch besides its losses."""
        return {}
