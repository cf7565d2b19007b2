"""The distributed engine: a training step under DeepSpeed, one optimiser step at a time."""

from __future__ import annotations

import atexit
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from blip_fast.model import BlipModel
from blip_train import collectives
from blip_train.guard import Guard
from blip_train.launch import rank_environment
from blip_train.pretraining import StepOutput
from blip_train.recipe import OptimizerRecipe, Recipe
from blip_train.step import TrainingStep

KEPT_WHOLE = 100_000  # elements up to which ZeRO 3 keeps a parameter on every rank: norms, biases, the temperature
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # rank 0 packs the data set while the others wait


def start_rank() -> torch.device:
    """Join the process group (as the only rank where no launcher started this process) and name this rank's device.

    One process joins once, however many runs it makes: DeepSpeed keeps groups that do not outlive the first.
    """
    cuda = torch.cuda.is_available()
    if dist.is_initialized():
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    os.environ.update(rank_environment())
    for variable, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(variable, alone)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    # DeepSpeed calls PyTorch's collectives by their old names, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    import deepspeed  # only now: importing it reads DS_ACCELERATOR

    # Its shared-memory all-reduce for CPUs would compile C++ for a minute at the first run; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)
    atexit.register(dist.destroy_process_group)
    return device


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch; each rank adds its number and draws its own negatives and drop-outs."""
    seed += collectives.world()[0]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class TrainingEngine:
    """DeepSpeed around the training step: gradients averaged over ranks, optimiser state sharded by ZeRO stage.

    Precisions of 16 bits are autocast over float32 weights, so that the momentum copy averages float32 and ranks
    exchange float32 gradients; `float16` scales the loss, and leaves out steps whose gradients overflow. DeepSpeed
    itself has to cast: on a GPU it switches off an autocast around its engine.
    """

    def __init__(self, pretraining: TrainingStep, recipe: Recipe, device: torch.device) -> None:
        import deepspeed

        self.recipe, self.device, self.guard = recipe, device, Guard(recipe.runtime.patience)
        pretraining.model.recompute(recipe.runtime.recomputed_blocks)
        adamw = torch.optim.AdamW(parameter_groups(pretraining, recipe.optimizer), lr=recipe.schedule.lr,
                                  betas=recipe.optimizer.betas, eps=recipe.optimizer.eps, fused=True)
        # DeepSpeed's own annotations are too narrow for what it takes and gives.
        initialize: Any = deepspeed.initialize
        self.engine, self.optimizer, _, _ = initialize(model=pretraining.to(device), optimizer=adamw,
                                                       config=self._config(), dist_init_required=False)

    @contextmanager
    def whole_model(self) -> Iterator[BlipModel]:
        """Within, every rank holds the model's whole weights, which ZeRO 3 shards. All ranks enter together."""
        import deepspeed

        parameters = list(self.pretraining.model.parameters())
        sharded = self.recipe.runtime.zero_stage == 3
        with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
            yield self.pretraining.model

    @property
    def pretraining(self) -> TrainingStep:
        return self.engine.module

    def step(self, batches: Iterator[Any], alpha: float, lr: float, language_only: bool) -> list[StepOutput]:
        """One optimiser step at learning rate `lr`, on the mean gradient of `accumulation` batches of this rank: the
        next whose losses are finite on all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        outputs: list[StepOutput] = []
        self.pretraining.follow()
        while len(outputs) < self.recipe.runtime.accumulation:
            output = self.engine(next(batches), alpha, language_only)
            if not self.guard.accepts(output.losses):
                continue
            self.engine.backward(output.total)
            self.pretraining.enqueue(output)
            self.engine.step()  # does nothing before the last batch
            outputs.append(output)
        return outputs

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.recipe.runtime.batch_size,
            "gradient_accumulation_steps": self.recipe.runtime.accumulation,
            "gradient_clipping": self.recipe.optimizer.clip,
            "torch_autocast": {"enabled": self.recipe.runtime.precision != "float32",
                               "dtype": self.recipe.runtime.precision.replace("float32", "bfloat16"),
                               "lower_precision_safe_modules": []},  # those whose gradients would travel in 16 bits
            "zero_optimization": {"stage": self.recipe.runtime.zero_stage,
                                  "stage3_param_persistence_threshold": KEPT_WHOLE},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }


def parameter_groups(pretraining: TrainingStep, optimizer: OptimizerRecipe) -> list[dict[str, Any]]:
    """What is trained, with the weight decay that it gets."""
    trained = [p for p in pretraining.parameters() if p.requires_grad]
    if optimizer.decay == "all":
        return [{"params": trained, "weight_decay": optimizer.weight_decay}]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


def mean_losses(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Each loss, and their sum `loss`, averaged over the batches of an optimiser step and over ranks."""
    losses = [{**output.losses, "loss": output.total} for output in outputs]
    values = torch.stack([torch.stack([loss.detach().float() for loss in one.values()]) for one in losses]).mean(0)
    if collectives.world()[1] > 1:
        dist.all_reduce(values)
        values /= collectives.world()[1]
    return dict(zip(losses[0], values.tolist(), strict=True))
