"""What the engine trains, whatever the task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from blip_fast.model.blip import BlipModel

if TYPE_CHECKING:
    from blip_train.steps.pretraining import StepOutput


class TrainingStep(nn.Module):
    """A model and the losses of a batch: `forward(batch, alpha, language_only) -> StepOutput`. `Pretraining` computes
    ITC, ITM and LM, `Answering` VQA's loss, `Reasoning` NLVR2's."""

    model: BlipModel

    def follow(self) -> None:
        """Called once an optimiser step, before its first batch."""

    def enqueue(self, *outputs: StepOutput) -> None:
        """Called once an optimiser step, behind its last backward, with all its batches' outputs."""
