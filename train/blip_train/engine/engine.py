"""The distributed engine: a training step under DeepSpeed, one optimiser step at a time."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from blip_fast.model.blip import BlipModel
from blip_train import collectives
from blip_train.engine.adamw import make_adamw
from blip_train.engine.agreement import Agreement
from blip_train.engine.batches import SeededBatch
from blip_train.engine.environment import rank_environment
from blip_train.engine.updates import Updates
from blip_train.engine.watchdog import Watchdog
from blip_train.recipe import Recipe
from blip_train.steps.step import StepOutput, TrainingStep

KEPT_WHOLE = 100_000  # elements up to which ZeRO 3 keeps a parameter on every rank: norms, biases, the temperature
REDUCE_BUCKET = 50_000_000  # elements of gradients that are exchanged at a time; the buffer is allocated whole
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


class TrainingEngine:
    """DeepSpeed around the training step: gradients averaged over ranks, optimiser state sharded by ZeRO stage.

    Precisions of 16 bits are autocast over float32 weights, so that the momentum copy averages float32 and ranks
    exchange float32 gradients; `float16` scales the loss, and leaves out steps whose gradients overflow. DeepSpeed
    itself has to cast: on a GPU it switches off an autocast around its engine.
    """

    def __init__(self, pretraining: TrainingStep, recipe: Recipe, device: torch.device) -> None:
        import deepspeed

        self.recipe, self.device, self.agreement = recipe, device, Agreement(recipe.runtime.patience)
        self.watchdog = Watchdog(recipe.runtime.timeout)
        pretraining.model.recompute(recipe.runtime.recomputed_blocks)
        if recipe.runtime.compile:
            pretraining.model.compile_blocks()
        # DeepSpeed's own annotations are too narrow for what it takes and gives.
        initialize: Any = deepspeed.initialize
        adamw = make_adamw(pretraining.to(device), recipe.optimizer, recipe.runtime, device)
        self.engine, self.optimizer, _, _ = initialize(model=pretraining, optimizer=adamw,
                                                       config=self._config(), dist_init_required=False)
        self.updates = Updates(self.engine, recipe.runtime.precision == "float16", recipe.optimizer.clip)

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

    def step(self, slots: Sequence[Iterator[SeededBatch]], alpha: float, lr: float,
             language_only: bool) -> list[StepOutput]:
        """One optimiser step at learning rate `lr`, on the mean gradient of one batch of each of the rank's slots
        (`accumulation` of them): its next whose losses are finite on all ranks. A step whose gradient is not finite
        leaves the weights as they are."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.watchdog.enter("momentum")
        self.pretraining.follow()
        outputs = [self._learn(batches, alpha, language_only) for batches in slots]
        self.agreement.updated(self.updates.applied, self.updates.loss_scale)
        self.watchdog.enter("queue")
        self.pretraining.enqueue(*outputs)
        return outputs

    def _learn(self, batches: Iterator[SeededBatch], alpha: float, language_only: bool) -> StepOutput:
        enter = self.watchdog.enter
        while True:
            enter("input")
            batch, seed = next(batches)
            enter("forward")
            torch.manual_seed(seed)
            output = self.engine(batch, alpha, language_only)
            enter("agreement on the batch")
            if self.agreement.accepts(output.losses):
                enter("backward")
                self.updates.backward(output.total)
                enter("update")
                self.updates.step()  # does nothing before the last batch
                return output

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.recipe.runtime.batch_size,
            "gradient_accumulation_steps": self.recipe.runtime.accumulation,
            "gradient_clipping": self.recipe.optimizer.clip if self.recipe.runtime.zero_stage else 0.0,  # see Updates
            "torch_autocast": {"enabled": self.recipe.runtime.precision != "float32",
                               "dtype": self.recipe.runtime.precision.replace("float32", "bfloat16"),
                               "lower_precision_safe_modules": []},  # those whose gradients would travel in 16 bits
            "zero_optimization": {"stage": self.recipe.runtime.zero_stage,
                                  "stage3_param_persistence_threshold": KEPT_WHOLE,
                                  "reduce_bucket_size": REDUCE_BUCKET,
                                  "offload_optimizer": {"device": "cpu" if self.recipe.runtime.offload else "none",
                                                        "pin_memory": self.device.type == "cuda"}},
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's runs there too, and bit for bit the same after a resume
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }


def mean_losses(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Each loss, and their sum `loss`, averaged over the batches of an optimiser step and over ranks."""
    losses = [{**output.losses, "loss": output.total} for output in outputs]
    values = torch.stack([torch.stack([loss.detach().float() for loss in one.values()]) for one in losses]).mean(0)
    if collectives.world()[1] > 1:
        dist.all_reduce(values)
        values /= collectives.world()[1]
    return dict(zip(losses[0], values.tolist(), strict=True))
