"""AdamW in an implementation that the machine has: PyTorch's fused one, DeepSpeed's or NVIDIA Apex's."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from blip_train.recipe import OptimizerRecipe, RuntimeRecipe
from blip_train.steps.step import TrainingStep


def make_adamw(step: TrainingStep, optimizer: OptimizerRecipe, runtime: RuntimeRecipe,
               device: torch.device) -> Any:
    """The recipe's optimiser over the trained parameters.

    `runtime.adamw` names the implementation. On GPUs `auto` means DeepSpeed's if its kernel
    is built, else Apex's if it is installed; otherwise it means PyTorch's. With
    `runtime.offload` PyTorch's updates on the CPU.

    Raises:
        ValueError: the named implementation cannot run here; the message says why.
    """
    # The learning rate is set each step.
    options = {"lr": 0.0, "betas": optimizer.betas, "eps": optimizer.eps}
    groups, name = parameter_groups(step, optimizer), runtime.adamw
    if name == "auto":
        name = next((other for other in ("deepspeed", "apex")
                     if not adamw_cannot(other, device, runtime.offload)),
                    "torch")
    elif reason := adamw_cannot(name, device, runtime.offload):
        raise ValueError(f"runtime.adamw {name} cannot run: {reason}; choose auto or torch")
    if name == "deepspeed":
        return import_module("deepspeed.ops.adam").FusedAdam(groups, adam_w_mode=True, **options)
    if name == "apex":
        return import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def adamw_cannot(name: str, device: torch.device, offload: bool) -> str | None:
    """Why the implementation `name` cannot run; None if it can."""
    if name == "torch":
        return None
    if device.type != "cuda" or offload:
        return "it updates on a GPU alone, and here the update is the CPU's"
    if name == "deepspeed":
        from deepspeed.git_version_info import installed_ops

        return None if installed_ops.get("fused_adam") else "DeepSpeed was installed without it (DS_BUILD_FUSED_ADAM=1)"
    # PyPI's `apex` is another package, without optimizers.
    if find_spec("apex") is None or find_spec("apex.optimizers") is None:
        return "NVIDIA Apex is not installed (from its repository, with its CUDA extensions)"
    return None


def parameter_groups(step: TrainingStep, optimizer: OptimizerRecipe) -> list[dict[str, Any]]:
    """The trained parameters, grouped by weight decay."""
    trained = [p for p in step.parameters() if p.requires_grad]
    if optimizer.decay == "all":
        return [{"params": trained, "weight_decay": optimizer.weight_decay}]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
