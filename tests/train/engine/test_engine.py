"""The step under DeepSpeed: losses and every gradient against the textbook, for each ZeRO stage
and number of ranks, with two batches accumulated, cross-rank negatives, momentum copy and
queue, over two optimiser steps."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.distributed as dist
from blip_train.engine.adamw import make_adamw, parameter_groups
from blip_train.engine.batches import SeededBatch
from blip_train.engine.engine import TrainingEngine
from blip_train.recipe import OptimizerRecipe, Recipe, RuntimeRecipe
from blip_train.schedule import Schedule
from blip_train.steps.pretraining import Objective, Pretraining
from blip_train.steps.step import StepContext
from ranks import join, spawn
from reference import pretraining as textbook
from small_pretraining import CONFIG, PAIRS, SIZES, check_gradients, everyone, make_batch, make_model, padded

from blip_fast.checkpoint.names import original_layout

STEPS, ACCUMULATION = 2, 2
OBJECTIVE = Objective(queue_size=43, momentum=0.9, positives="id", negatives="all_ranks", negative_floor=0.0)
VARIANTS = {"0": {"zero_stage": 0}, "1": {"zero_stage": 1}, "2": {"zero_stage": 2}, "3": {"zero_stage": 3},
            "3 recomputed": {"zero_stage": 3, "recomputed_blocks": 2},
            "2 offloaded": {"zero_stage": 2, "offload": True},
            "3 offloaded": {"zero_stage": 3, "offload": True}, "3 with a bad batch": {"zero_stage": 3}}


def make_recipe(**runtime) -> Recipe:
    return Recipe(model=CONFIG, objective=OBJECTIVE, schedule=Schedule(lr=0.01),
                  runtime=RuntimeRecipe(batch_size=PAIRS, accumulation=ACCUMULATION, precision="float32",
                                        **runtime))


def slots(variant: str, step: int, rank: int, ranks: int) -> list[Iterator[SeededBatch]]:
    """An optimiser step's batches; one variant puts a batch before them whose images
    are NaN on the last rank only."""
    batches = [make_batch(ACCUMULATION * step + i, rank) for i in range(ACCUMULATION)]
    if "bad batch" in variant:
        spare = make_batch(1000, rank)
        batches.insert(0, replace(spare, images=spare.images * float("nan")) if rank == ranks - 1 else spare)
    return [iter([SeededBatch(batch, seed=rank) for batch in batches])] * ACCUMULATION


def carry_out(ranks: int, device: torch.device, variant: str) -> list[dict]:
    """Per optimiser step: weights before it, losses and negatives of each batch by
    rank, the averaged gradients."""
    from deepspeed.utils import safe_get_full_grad

    rank, runtime = dist.get_rank(), VARIANTS[variant]
    torch.manual_seed(0)
    engine = TrainingEngine(Pretraining(make_model(), OBJECTIVE, seed=3).train(), make_recipe(**runtime),
                            device)
    parameters, record, plain = dict(engine.training_step.model.named_parameters()), [], engine.engine.step

    def noting_gradients():
        if engine.engine.is_gradient_accumulation_boundary():
            for name, parameter in parameters.items():
                grad = parameter.grad if runtime["zero_stage"] == 0 else safe_get_full_grad(parameter)
                record[-1]["gradients"][name] = torch.zeros(()) if grad is None else grad.clone()
        plain()

    engine.engine.step = noting_gradients
    for step in range(STEPS):
        with engine.whole_model() as model:
            record.append({"weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
                           "gradients": {}})
        outputs = engine.step(slots(variant, step, rank, ranks), 0.01, StepContext(alpha=0.2 * step))
        losses = torch.stack([torch.stack([o.losses[k].detach() for k in ("itc", "itm", "lm")])
                              for o in outputs])
        drawn = torch.stack([torch.stack([o.negatives.image_for_text, o.negatives.text_for_image])
                             for o in outputs])
        record[-1] |= {"losses": everyone(losses, ranks), "negatives": everyone(drawn, ranks)}
    assert engine.agreement.skipped == (STEPS if "bad batch" in variant else 0)
    record[-1]["queue"] = {key: value.clone()
                           for key, value in engine.training_step.queue.state_dict().items()}
    return record


def _rank(rank: int, ranks: int, port: int, variants: list[str], path: str) -> None:
    device = join(rank, ranks, port)
    records = {variant: carry_out(ranks, device, variant) for variant in variants}
    if rank == 0:
        torch.save(records, path)
    dist.barrier()


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
                ids=lambda n: f"{n} ranks")
def records(request, tmp_path_factory) -> tuple[int, dict]:
    ranks, path = request.param, str(tmp_path_factory.mktemp("records") / "records.pt")
    spawn(_rank, ranks, list(VARIANTS), path)
    return ranks, torch.load(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_textbook(records, variant):
    ranks, record = records[0], records[1][variant]
    layout = original_layout(CONFIG)
    reference = textbook.TextbookPretraining(SIZES, OBJECTIVE.queue_size, OBJECTIVE.momentum, retrieval=True,
                                             all_ranks=True)
    queue = Pretraining(make_model(), OBJECTIVE, seed=3).queue
    weights = to_textbook(layout, record[0]["weights"], reference)
    reference.load_weights(weights)
    reference.image_queue.copy_(queue.image.T)
    reference.text_queue.copy_(queue.text.T)
    for step, ours in enumerate(record):
        reference.load_state_dict(to_textbook(layout, ours["weights"], reference), strict=False)
        reference.zero_grad()
        keys = []
        reference.enqueue = lambda *of_batch: keys.append(of_batch)  # noqa: B023 (used within the step)
        for i in range(ACCUMULATION):
            reference.momentum = OBJECTIVE.momentum if i == 0 else 1.0  # the copy follows once a step
            batches = [padded(make_batch(ACCUMULATION * step + i, rank)) for rank in range(ranks)]
            negatives = [textbook.Negatives(*drawn[i]) for drawn in ours["negatives"]]
            expected = reference.step(batches, 0.2 * step, negatives)
            (expected.loss / ACCUMULATION).backward()
            for rank in range(ranks):
                wanted = torch.stack([expected.itc[rank], expected.itm[rank], expected.lm[rank]])
                torch.testing.assert_close(ours["losses"][rank][i], wanted, rtol=1e-4, atol=0,
                                           msg=lambda m, at=(step, i, rank): f"step, batch, rank {at}: {m}")
        del reference.enqueue
        # The queue takes a step's keys behind all its batches, rank by rank.
        by_rank = [torch.cat([part.view(ranks, PAIRS, -1) for part in parts], dim=1).flatten(0, 1)
                   for parts in zip(*keys, strict=True)]
        reference.enqueue(*by_rank[:2], by_rank[2].flatten())
        check_gradients(layout.split(ours["gradients"]), dict(reference.named_parameters()))
    torch.testing.assert_close(record[-1]["queue"]["image"], reference.image_queue.T, rtol=1e-4, atol=1e-5)


def to_textbook(layout, weights, reference) -> dict:
    state = layout.split(weights)
    state |= layout.stored_twice(state)
    buffers = {key: value for key, value in reference.state_dict().items() if key.endswith("position_ids")}
    return {key: value for key, value in (state | buffers).items() if key in reference.state_dict()}


def test_weights_move_alike_under_every_stage(records):
    """After an AdamW step, whose first is nearly the sign of the gradient: where that is rounding noise
    (keys' biases), it may have any."""
    gradients = records[1]["0"][0]["gradients"]
    weights = {variant: record[1]["weights"] for variant, record in records[1].items()
               if "bad batch" not in variant}  # which draws negatives for it too, and then others
    moved = 0
    for variant, found in weights.items():
        for name, gradient in gradients.items():
            certain = gradient.abs() > 1e-4
            torch.testing.assert_close(found[name][certain], weights["0"][name][certain], atol=1e-5, rtol=0,
                                       msg=lambda m, at=(variant, name): f"{at}: {m}")
            moved += int((found[name] != records[1]["0"][0]["weights"][name])[certain].sum())
    assert moved > 10_000


def test_weight_decay_can_leave_out_norms_and_biases():
    pretraining = Pretraining(make_model(), OBJECTIVE, seed=3)
    (every,) = parameter_groups(pretraining, OptimizerRecipe(weight_decay=0.1))
    decayed, plain = parameter_groups(pretraining, OptimizerRecipe(weight_decay=0.1, decay="matrices"))
    assert (every["weight_decay"], decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.1, 0.0)
    assert {p for group in (decayed, plain) for p in group["params"]} == set(every["params"])
    names = {id(p): name for name, p in pretraining.model.named_parameters()}
    left_out = {names[id(p)] for p in plain["params"]}
    assert {"vision.cls_token", "temperature", "vision.norm.weight", "vision.blocks.0.qkv.bias"} <= left_out
    assert not any(name.endswith(("word_embeds.weight", "qkv.weight", "position_embeds"))
                   for name in left_out)


def test_adamw_by_name(monkeypatch):
    """GPUs and their packages are stand-ins: which implementation is taken, and with what."""
    def made(name, device, **runtime):
        return make_adamw(pretraining, OptimizerRecipe(weight_decay=0.1),
                          RuntimeRecipe(adamw=name, **runtime), torch.device(device))

    pretraining, taken = Pretraining(make_model(), OBJECTIVE, seed=3), []
    assert isinstance(made("auto", "cpu"), torch.optim.AdamW) and isinstance(made("auto", "cuda"),
                                                                             torch.optim.AdamW)
    for name, reason in (("deepspeed", "installed without it"), ("apex", "NVIDIA Apex is not installed")):
        with pytest.raises(ValueError, match=f"runtime.adamw {name} cannot run: .*{reason}.*; choose auto or "
                                             "torch"):
            made(name, "cuda")
        with pytest.raises(ValueError, match="here the update is the CPU's"):
            made(name, "cpu")

    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = lambda groups, **options: taken.append((groups, options)) or "apex's"
    apex.__spec__ = ModuleSpec("apex.optimizers", None)
    package = types.ModuleType("apex")
    package.__spec__, package.__path__ = ModuleSpec("apex", None), []
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    assert made("auto", "cuda") == "apex's"
    (groups,), options = taken[0]
    assert groups["weight_decay"] == 0.1 and options["adam_w_mode"] and options["betas"] == (0.9, 0.999)
    assert isinstance(made("auto", "cuda", offload=True), torch.optim.AdamW)
