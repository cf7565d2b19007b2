"""Optimiser steps, which all ranks leave out together if a gradient is not finite, and float16's loss scale.

DeepSpeed's stages 1 to 3 compute the norm of all ranks' gradients and leave a step out if it is not finite.
DeepSpeed 0.19 lacks two things. Stage 0 checks nothing. And with autocast to float16 it scales losses by a
`GradScaler` that learns of no overflow: its scale never falls, and every later step is left out. DeepSpeed's
own loss scaler does fall, clips gradients at their true size, and is saved, so it is used instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOSS_SCALE = {"init_scale": 2.0**16, "scale_window": 2000, "min_scale": 1.0, "delayed_shift": 1,
              "consecutive_hysteresis": False, "raise_error_at_min_scale": False}


class Updates:
    """Backward and optimiser step of a DeepSpeed engine of any ZeRO stage.

    Attributes:
        applied: whether the last optimiser step changed the weights. If not, weights, optimiser
            state and schedule are as before.

    Args:
        engine: DeepSpeed's engine.
        float16: scale losses, so that small gradients survive in 16 bits.
        clip: gradient norm at stage 0; 0: no clipping. The other stages clip by DeepSpeed's configuration.
    """

    def __init__(self, engine: Any, float16: bool, clip: float) -> None:
        from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

        self._engine, self._clip, self.applied = engine, clip, True
        self._sharded = engine.zero_optimization_stage() > 0
        optimizer = engine.optimizer
        optimizer.loss_scaler = CreateLossScaler(torch.float16 if float16 else torch.float32, 1.0, float16,
                                                 LOSS_SCALE)
        if self._sharded:
            optimizer.dynamic_loss_scale, optimizer.torch_autocast_gradscaler = float16, None
        else:
            engine.torch_autocast_z0_gradscaler = None

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scaler.loss_scale)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss if self._sharded else loss * self.loss_scale)

    def step(self) -> None:
        """A no-op before the last batch of an accumulation."""
        last = self._engine.is_gradient_accumulation_boundary()
        finite = self._sharded or not last or self._finish_gradients()
        self._engine.step()
        if last:
            self.applied = finite and self._engine.was_step_applied()

    def _finish_gradients(self) -> bool:
        """Stage 0, where all ranks hold the same gradients: unscale and clip them, or drop all if one is not
        finite. Returns whether they are finite. (DeepSpeed's own clipping fails without gradients.)"""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        finite = math.isfinite(norm)
        if not finite:
            self._engine.zero_grad()
            self._engine.skipped_steps += 1  # as the other stages count
        else:
            clipped = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
            if (factor := clipped / self.loss_scale) != 1.0:
                torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        self._engine.optimizer.loss_scaler.update_scale(not finite)
        return finite
