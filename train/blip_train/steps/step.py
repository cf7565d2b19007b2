"""What the engine trains, whatever the task."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel


class Negatives(NamedTuple):
    """Indices into the candidates (the rank's batch, or all ranks' batches): int64 [batch], −1 where there is none."""

    image_for_text: Tensor
    text_for_image: Tensor


class StepOutput(NamedTuple):  # a tuple, because ZeRO 3 looks for tensors in what a module returns
    """What a batch computed. `losses` are scalars with gradients."""

    losses: dict[str, Tensor]
    negatives: Negatives | None = None
    keys: tuple[Tensor, Tensor, Tensor] | None = None  # for the queue: momentum features (image, text) and ids
    exchanged: tuple[int, int] | None = None  # visual tokens: bytes fetched, bytes an all-gather would move

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class TrainingStep(nn.Module):
    """A model and the losses of a batch: `forward(batch, alpha, language_only) -> StepOutput`. `Pretraining` computes
    ITC, ITM and LM, `Answering` VQA's loss, `Reasoning` NLVR2's, `Dialogues` VisDial's."""

    model: BlipModel

    def follow(self) -> None:
        """Called once an optimiser step, before its first batch."""

    def enqueue(self, *outputs: StepOutput) -> None:
        """Called once an optimiser step, after its last backward, with all its batches' outputs."""
