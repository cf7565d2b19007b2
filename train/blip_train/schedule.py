"""Learning rate and soft-target share as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then per-epoch decay (pre-training) or cosine to `min_lr` (fine-tuning).

    `epochs` counts passes over the training split. `max_steps` ends a run earlier (0: no limit)
    and is then the cosine's horizon.
    """

    kind: Literal["epoch_decay", "cosine"] = "epoch_decay"
    lr: float = 3e-4
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_steps: int = 3000
    decay: float = 0.9  # per epoch, for epoch_decay
    epochs: int = 20
    max_steps: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs must be at least 1, got {self.epochs}")
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"schedule.min_lr must lie in [0, lr], got {self.min_lr} with lr {self.lr}")

    def total_steps(self, steps_per_epoch: float) -> int:
        steps = int(self.epochs * steps_per_epoch)
        return min(steps, self.max_steps) if self.max_steps else steps

    def lr_at(self, step: int, steps_per_epoch: float) -> float:
        """Learning rate of optimiser step `step` (from 0). With accumulation an
        epoch may end within a step."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if self.kind == "cosine":
            horizon = max(self.total_steps(steps_per_epoch) - self.warmup_steps, 1)
            share = min((step - self.warmup_steps) / horizon, 1.0)
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))
        return max(self.min_lr, self.lr * self.decay ** int(step / steps_per_epoch))


def alpha_at(step: int, steps_per_epoch: float, alpha: float, ramp_epochs: float) -> float:
    """Share of ITC's soft targets: 0 → `alpha`, linear over the first
    `ramp_epochs` epochs (BLIP section 4.1)."""
    if ramp_epochs <= 0:
        return alpha
    return alpha * min(1.0, step / (ramp_epochs * steps_per_epoch))
