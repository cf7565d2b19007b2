"""Steps whose gradients are not finite are left out on all ranks, under every ZeRO stage;
float16's loss scale and clipping."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from blip_train.checkpoint import checkpoints
from blip_train.checkpoint.writer import Writer
from blip_train.engine import engine as engines
from blip_train.engine.agreement import Agreement
from blip_train.engine.batches import SeededBatch
from blip_train.engine.engine import TrainingEngine
from blip_train.engine.environment import rank_environment
from blip_train.engine.step_slots import Streams
from blip_train.recipe import OptimizerRecipe, RuntimeRecipe
from blip_train.steps.pretraining import Pretraining
from blip_train.steps.step import StepContext, StepOutput
from ranks import join, spawn
from small_pretraining import make_batch, make_model
from test_engine import make_recipe

BAD = {"nan": float("nan"), "inf": float("inf")}
STAGES = (0, 1, 2, 3)
CLIP, EPS, LR = 0.01, 1e-2, 1e-2  # a step's size turns on the gradient's where AdamW's eps is large beside it


class _Backward(torch.autograd.Function):
    """x → x, with a gradient times `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Poisoned(Pretraining):
    """The losses are unchanged; LM's gradients are multiplied by `factor`."""

    factor = 1.0

    def forward(self, *args) -> StepOutput:
        output = super().forward(*args)
        return output._replace(losses=output.losses
                               | {"lm": _Backward.apply(output.losses["lm"], self.factor)})


def make_engine(device, stage: int, precision="float32", patience=1, accumulation=2) -> TrainingEngine:
    recipe = make_recipe(zero_stage=stage, patience=patience)
    recipe = replace(recipe, objective=replace(recipe.objective, negatives="local"),
                     runtime=replace(recipe.runtime, precision=precision, accumulation=accumulation),
                     optimizer=OptimizerRecipe(clip=CLIP, eps=EPS))
    torch.manual_seed(0)
    return TrainingEngine(Poisoned(make_model(), recipe.objective, seed=3).train(), recipe, device)


def train_step(engine: TrainingEngine, step: int) -> None:
    accumulation = engine.recipe.runtime.accumulation
    batches = (SeededBatch(make_batch(accumulation * step + i, dist.get_rank()), step)
               for i in range(accumulation))
    engine.step([batches] * accumulation, LR, StepContext(alpha=0.4))


def held(engine: TrainingEngine) -> list[torch.Tensor]:
    """Whole weights, and what this rank holds of the optimiser's state."""
    with engine.whole_model() as model:
        weights = [weight.detach().clone() for weight in model.parameters()]
    adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return weights + [value.clone() for state in adamw.state.values() for value in state.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def moved(weights: list[torch.Tensor], before: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(weight - was).detach().flatten() for weight, was in zip(weights, before, strict=True)])


def leave_out(device, stage: int, bad: str) -> None:
    """Only the last rank's gradients are bad, and all ranks leave the step out."""
    engine, last = make_engine(device, stage), dist.get_rank() == dist.get_world_size() - 1
    train_step(engine, 0)
    before = held(engine)
    assert engine.updates.applied
    engine.training_step.factor = BAD[bad] if last else 1.0
    train_step(engine, 1)
    assert same(held(engine), before) and engine.agreement.skipped_updates == 1 and not engine.updates.applied
    engine.training_step.factor = 1.0
    train_step(engine, 2)
    after = held(engine)
    assert not same(after, before) and all(tensor.isfinite().all() for tensor in after)
    assert engine.agreement.skipped_updates == 1 and engine.agreement.skipped == 0
    engine.training_step.factor = BAD[bad] if last else 1.0
    train_step(engine, 3)
    with pytest.raises(ValueError, match="2 steps in a row had gradients that are not finite"):
        train_step(engine, 4)


def fit_scale(device, stage: int, folder) -> None:
    """A loss scale that is far too high falls step by step, whatever `patience`. Then weights move, and
    a resume restores the scale."""
    engine, start = make_engine(device, stage, "float16", patience=0), 2.0**22
    engine.optimizer.loss_scaler.cur_scale = start
    before, steps = held(engine), 0
    while not steps or not engine.updates.applied:
        assert same(held(engine), before) and engine.updates.loss_scale == start / 2**steps and steps < 30
        train_step(engine, steps)
        steps += 1
    assert steps > 3 and not same(held(engine)[: len(before)], before)
    streams = Streams(slots=4, streams=2, ranks=2)
    checkpoints.save(engine.engine, folder / str(stage), steps, streams, {},
                     RuntimeRecipe(precision="float16", keep_checkpoints=1),
                     Writer(engine.engine, background=False))
    resumed = make_engine(device, stage, "float16")
    checkpoints.load(resumed.engine, folder / str(stage), streams, {})
    assert resumed.updates.loss_scale == engine.updates.loss_scale and same(held(resumed), held(engine))


def _rank(rank: int, ranks: int, port: int, folder) -> None:
    device = join(rank, ranks, port)
    for stage in STAGES:
        leave_out(device, stage, "nan" if stage % 2 else "inf")
        fit_scale(device, stage, folder)
    dist.barrier()


def test_two_ranks_leave_out_what_is_not_finite_and_find_their_loss_scale(tmp_path):
    spawn(_rank, 2, tmp_path)


def _clipped(rank: int, ranks: int, port: int) -> None:
    """Weights after a step under each stage and precision, against plain PyTorch."""
    os.environ.update(rank_environment())
    device = engines.start_rank()
    torch.set_num_threads(1)
    plain = make_engine(device, 0, accumulation=1).training_step
    before = [weight.detach().clone() for weight in plain.model.parameters()]
    adamw = torch.optim.AdamW(plain.model.parameters(), lr=LR, eps=EPS, weight_decay=0.05)
    batch = make_batch(0, 0)
    torch.manual_seed(0)  # of `train_step`
    plain.follow()
    plain(batch, StepContext(alpha=0.4)).total.backward()
    torch.nn.utils.clip_grad_norm_(plain.model.parameters(), CLIP)
    adamw.step()
    expected = moved(list(plain.model.parameters()), before)
    for stage in STAGES:
        for precision, bound in (("float32", 1e-4), ("float16", 3e-2)):
            engine = make_engine(device, stage, precision, accumulation=1)
            train_step(engine, 0)
            assert engine.updates.applied
            found = moved(held(engine)[: len(before)], before)
            assert (found - expected).norm() < bound * expected.norm(), (stage, precision)


def test_gradients_are_clipped_at_their_true_size():
    spawn(_clipped, 1)


def test_patience_waits_for_the_loss_scale():
    agreement = Agreement(patience=1)
    for scale in (4.0, 2.0, 1.0):
        agreement.updated(False, scale)
    assert agreement.skipped_updates == 3
    with pytest.raises(ValueError, match="2 steps in a row had gradients"):
        agreement.updated(False, 1.0)
