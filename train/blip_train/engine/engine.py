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
from blip_train.steps.step import StepContext, StepOutput, TrainingStep

# Elements up to which ZeRO 3 keeps a parameter on every rank: norms, biases, the temperature.
KEPT_WHOLE = 100_000
# Elements of gradients that are exchanged at a time; the buffer is allocated in full.
REDUCE_BUCKET = 50_000_000
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # rank 0 packs the data set while the others wait


def start_rank() -> torch.device:
    """Join the process group (as the only rank if no launcher started this
    process). Returns this rank's device.

    A process joins once, however many runs it makes: DeepSpeed caches process groups, which do not
    outlive the first initialisation.
    """
    cuda = torch.cuda.is_available()
    if dist.is_initialized():
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    os.environ.update(rank_environment())
    for variable, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"),
                            ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(variable, alone)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    # DeepSpeed calls PyTorch's collectives by their old names, once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    import deepspeed  # not earlier: importing it reads DS_ACCELERATOR

    # Its shared-memory all-reduce for CPUs would compile C++ for a minute at the
    # first run; gloo works without it.
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
    """DeepSpeed around a training step: gradients averaged over ranks, optimiser state sharded by ZeRO stage.

    16-bit precisions are autocast over float32 weights, so that the momentum copy averages float32 weights
    and ranks exchange float32 gradients. `float16` scales the loss and leaves out steps whose gradients
    overflow. DeepSpeed itself must do the casting: on a GPU it disables an autocast around its engine.
    """

    def __init__(self, step: TrainingStep, recipe: Recipe, device: torch.device) -> None:
        import deepspeed

        self.recipe, self.device, self.agreement = recipe, device, Agreement(recipe.runtime.patience)
        self.watchdog = Watchdog(recipe.runtime.timeout)
        step.model.recompute(recipe.runtime.recomputed_blocks)
        if recipe.runtime.compile:
            step.model.compile_blocks()
        # DeepSpeed's own annotations are narrower than what it takes and returns.
        initialize: Any = deepspeed.initialize
        adamw = make_adamw(step.to(device), recipe.optimizer, recipe.runtime, device)
        self.engine, self.optimizer, _, _ = initialize(model=step, optimizer=adamw, config=self._config(),
                                                       dist_init_required=False)
        self.updates = Updates(self.engine, recipe.runtime.precision == "float16", recipe.optimizer.clip)

    @contextmanager
    def whole_model(self) -> Iterator[BlipModel]:
        """Within, every rank holds the model's whole weights, which ZeRO 3
        shards. All ranks enter together."""
        import deepspeed

        parameters = list(self.training_step.model.parameters())
        sharded = self.recipe.runtime.zero_stage == 3
        with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
            yield self.training_step.model

    @property
    def training_step(self) -> TrainingStep:
        return self.engine.module

    def step(self, slots: Sequence[Iterator[SeededBatch]], lr: float,
             context: StepContext) -> list[StepOutput]:
        """One optimiser step at learning rate `lr`, on the mean gradient of one batch from each of the rank's
        slots (`accumulation` of them). A slot gives its next batch whose losses are finite on all ranks. A
        step whose gradient is not finite leaves the weights unchanged."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.watchdog.enter("momentum")
        self.training_step.follow()
        outputs = [self._learn(batches, context) for batches in slots]
        self.agreement.updated(self.updates.applied, self.updates.loss_scale)
        self.watchdog.enter("queue")
        self.training_step.enqueue(*outputs)
        return outputs

    def _learn(self, batches: Iterator[SeededBatch], context: StepContext) -> StepOutput:
        enter = self.watchdog.enter
        while True:
            enter("input")
            batch, seed = next(batches)
            enter("forward")
            torch.manual_seed(seed)
            output = self.engine(batch, context)
            enter("agreement on the batch")
            if self.agreement.accepts(output.losses):
                enter("backward")
                self.updates.backward(output.total)
                enter("update")
                self.updates.step()  # a no-op before the last batch
                return output

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.recipe.runtime.batch_size,
            "gradient_accumulation_steps": self.recipe.runtime.accumulation,
            # Stage 0 is clipped by `Updates`.
            "gradient_clipping": self.recipe.optimizer.clip if self.recipe.runtime.zero_stage else 0.0,
            "torch_autocast": {"enabled": self.recipe.runtime.precision != "float32",
                               "dtype": self.recipe.runtime.precision.replace("float32", "bfloat16"),
                               # Gradients of modules named here would be exchanged in 16 bits.
                               "lower_precision_safe_modules": []},
            "zero_optimization": {"stage": self.recipe.runtime.zero_stage,
                                  "stage3_param_persistence_threshold": KEPT_WHOLE,
                                  "reduce_bucket_size": REDUCE_BUCKET,
                                  "offload_optimizer": {"device": "cpu" if self.recipe.runtime.offload
                                                        else "none",
                                                        "pin_memory": self.device.type == "cuda"}},
            # PyTorch's optimiser runs on the CPU too, and gives the same bits after a resume.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }


def mean_losses(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Each loss, and their sum as `loss`, averaged over an optimiser step's batches and over ranks."""
    losses = [{**output.losses, "loss": output.total} for output in outputs]
    values = torch.stack([torch.stack([loss.detach().float() for loss in one.values()])
                          for one in losses]).mean(0)
    if collectives.world()[1] > 1:
        dist.all_reduce(values)
        values /= collectives.world()[1]
    return dict(zip(losses[0], values.tolist(), strict=True))
