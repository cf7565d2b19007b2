"""What ranks agree on: whether a batch's losses and a step's gradients are usable, and whether to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip_train.collectives import world

STOPPED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, after saving


class Agreement:
    """Counts what was left out, and knows whether any rank got SIGTERM (a cluster takes its machine back).

    Attributes:
        skipped: batches of the run that all ranks left out because some rank's loss was NaN or infinite.
        skipped_updates: steps that all ranks left out because a gradient was.
        stopping: whether to save and end after this step.

    Args:
        patience: how many batches in a row, or steps in a row, may be left out.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.skipped, self.stopping = patience, 0, False
        self.skipped_updates = 0
        self._in_a_row, self._updates_in_a_row, self._sigterm = 0, 0, False
        # Two numbers in host memory, exchanged by gloo, so that nothing waits for the GPUs' own collectives.
        self._group = dist.new_group(backend="gloo") if world()[1] > 1 else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM ends the run after its current step."""
        def note(*_: Any) -> None:
            self._sigterm = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def accepts(self, losses: dict[str, Tensor]) -> bool:
        """Whether the losses of all ranks are finite. All ranks call it together and get the same answer.

        Raises:
            ValueError: more than `patience` batches in a row had losses that are
                not; names this rank's losses.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        finite = all(abs(value) < float("inf") for value in values)
        flags = torch.tensor([not finite, self._sigterm], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        refused, self.stopping = flags.bool().tolist()
        self.skipped, self._in_a_row = self.skipped + refused, self._in_a_row + 1 if refused else 0
        if self._in_a_row > self.patience:
            here = ", ".join(f"{name} {value:.4g}" for name, value in zip(losses, values, strict=True))
            raise ValueError(f"{self._in_a_row} batches in a row had a loss that is not finite (here "
                             f"{here}): lower schedule.lr or raise schedule.warmup_steps, and resume from "
                             "the last checkpoint")
        return not refused

    def updated(self, applied: bool, loss_scale: float) -> None:
        """Count a step whose losses are finite but which all ranks left out.

        Args:
            applied: whether the step changed the weights.
            loss_scale: float16's. It falls with each step that is left out; once it cannot
                fall further, `patience` counts.

        Raises:
            ValueError: more than `patience` steps in a row were left out.
        """
        self.skipped_updates += not applied
        self._updates_in_a_row = 0 if applied else self._updates_in_a_row + (loss_scale <= 1.0)
        if self._updates_in_a_row > self.patience:
            raise ValueError(f"{self._updates_in_a_row} steps in a row had gradients that are not finite, of "
                             "losses that are: lower schedule.lr, raise schedule.warmup_steps or take "
                             "another runtime.precision, and resume from the last checkpoint")
