"""What `blip_train.forecast.estimate` says of memory and traffic against what ranks really allocate
and send, for each ZeRO stage."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os

import pytest
import torch
import torch.distributed as dist
from blip_train.engine.batches import SeededBatch
from blip_train.engine.engine import TrainingEngine
from blip_train.forecast.estimate import Plan, exchange_bytes, host_memory, memory, meta_pretraining, traffic
from blip_train.recipe import Recipe, RuntimeRecipe, TokenizerRecipe
from blip_train.schedule import Schedule
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from counting import Counting, socket_bytes
from ranks import join, spawn

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts

CONFIG = BlipConfig(vision=VisionConfig(image_size=64, width=96, layers=2, heads=3), embed_dim=64,
                    text=TextConfig(vocab_size=2000, width=96, layers=2, heads=3, mlp_width=384,
                                    max_positions=64, dropout=0.0), tokens=SpecialTokens(0, 1, 2, 3, 4))
PAIRS, TOKENS, KEPT_WHOLE, BUCKET, STEPS = 8, 10, 1000, 300_000, 2
# ZeRO stage, negatives, accumulation, ZeRO 3's reuse distance (0 lets every module gather its weights anew)
VARIANTS = {"0 local": (0, "local", 1, None), "1 all ranks": (1, "all_ranks", 1, None),
            "2 local": (2, "local", 1, None), "3 all ranks": (3, "all_ranks", 1, None),
            "3 without reuse": (3, "local", 1, 0)}
MORE = {"0 all ranks": (0, "all_ranks", 1, None), "1 local": (1, "local", 1, None),
        "2 all ranks": (2, "all_ranks", 1, None), "3 local": (3, "local", 1, None),
        "1 accumulated": (1, "local", 2, None), "2 accumulated": (2, "all_ranks", 2, None),
        "3 accumulated": (3, "local", 2, None), "1 offloaded": (1, "local", 1, None),
        "2 offloaded": (2, "local", 1, None), "3 offloaded": (3, "local", 1, None)}


def make_plan(variant: str, ranks: int) -> Plan:
    stage, negatives, accumulation, distance = (VARIANTS | MORE)[variant]
    recipe = Recipe(model=CONFIG, tokenizer=TokenizerRecipe(vocab_size=2000), schedule=Schedule(lr=1e-4),
                    objective=Objective(queue_size=100, negatives=negatives),
                    runtime=RuntimeRecipe(batch_size=PAIRS, zero_stage=stage, accumulation=accumulation,
                                          precision="bfloat16", offload="offloaded" in variant))
    own = {} if distance is None else {"prefetch": 0, "reuse_distance": distance}
    return Plan(recipe, meta_pretraining(recipe), ranks, stage, TOKENS, KEPT_WHOLE, BUCKET, **own)


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    texts = [[1, *torch.randint(5, 2000, (TOKENS - 2,), generator=generator).tolist(), 2]
             for _ in range(PAIRS)]
    return Batch(torch.randn(PAIRS, 3, 64, 64, generator=generator), PackedTexts.from_lists(texts),
                 seed * PAIRS + torch.arange(PAIRS))


class _Engine(TrainingEngine):
    """With the small bucket and, where the plan says so, without reuse."""

    plan: Plan

    def _config(self):
        config = super()._config()
        config["zero_optimization"] |= {"reduce_bucket_size": BUCKET,
                                        "stage3_prefetch_bucket_size": self.plan.prefetch,
                                        "stage3_max_reuse_distance": self.plan.reuse_distance}
        return config


def carry_out(plan: Plan, device: torch.device) -> dict[str, float]:
    """Bytes of an optimiser step, averaged over `STEPS` after three that DeepSpeed needs to learn
    the modules' order: sent in all, by all-to-all and through sockets; allocated after the step,
    in the update, at the peak."""
    rank, recipe, found = dist.get_rank(), plan.recipe, {}
    torch.manual_seed(0)
    batches = [make_batch(recipe.runtime.accumulation * rank + i) for i in range(recipe.runtime.accumulation)]
    _Engine.plan = plan
    with Counting() as counting:
        engine = _Engine(Pretraining(BlipModel(CONFIG), recipe.objective, seed=0).train(), recipe, device)
        optimizer = engine.optimizer if plan.stage == 0 else engine.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: found.update(update=counting.alive()))
        fetched = []
        for step in range(3 + STEPS):
            if step == 3:
                dist.barrier()
                counting.sent.clear()
                counting.peak, sockets = 0, socket_bytes()
            outputs = engine.step([iter([SeededBatch(batch, seed=0)]) for batch in batches], 1e-4,
                                  StepContext(0.4))
            if step >= 3 and outputs[0].exchanged:
                fetched += [output.exchanged[0] for output in outputs]
            del outputs
        found |= {name: count / STEPS for name, count in counting.sent.items()}
        found |= {"sent": counting.sent.total() / STEPS, "sockets": (socket_bytes() - sockets) / STEPS,
                  "fetched bytes": sum(fetched) / STEPS, "peak": counting.peak}
        gc.collect()
        found["after"] = counting.alive()
    return found


def _rank(rank: int, ranks: int, port: int, variants: list[str], path: str) -> None:
    os.environ["BLIP_FAST_ATTENTION"] = "reference"
    loss = importlib.import_module("blip_kernels.linear_cross_entropy")
    loss.PLAIN = loss.KEPT = 0  # a GPU holds no logits
    device, records = join(rank, ranks, port, KEPT_WHOLE), {}
    for variant in variants:
        mine = carry_out(make_plan(variant, ranks), device)
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine)
        records[variant] = {name: sum(one.get(name, 0.0) for one in everyone) / ranks for name in mine}
    if rank == 0:
        torch.save(records, path)
    dist.barrier()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)],
                ids=lambda n: f"{n} ranks")
def measured(request, tmp_path_factory) -> tuple[int, dict[str, dict[str, float]]]:
    """Of an average rank."""
    variants = list(VARIANTS) if request.param == 2 else [*VARIANTS, *MORE]
    path = str(tmp_path_factory.mktemp("records") / "records.pt")
    spawn(_rank, request.param, variants, path)
    return request.param, torch.load(path)


def test_traffic_is_what_ranks_send(measured):
    """Within 5 %, and part by part: gradients and weights, features, the rows that negatives really chose."""
    ranks, records = measured
    for variant, found in records.items():
        plan = make_plan(variant, ranks)
        parts = traffic(plan)
        assert found["sent"] == pytest.approx(sum(parts.values()), rel=0.05), variant
        assert found["allgather_"] == pytest.approx(parts["features"], rel=0.05), variant
        if plan.fetched:
            row = 4 * CONFIG.vision.tokens * CONFIG.vision.width
            rows = found["fetched bytes"] / row / plan.recipe.runtime.accumulation
            wanted = plan.recipe.runtime.accumulation * exchange_bytes(plan, rows)
            assert found["alltoall_base_"] == pytest.approx(wanted, rel=0.05), variant
            assert rows == pytest.approx(plan.fetched, rel=0.3), variant  # chosen at random


def test_sockets_carry_what_the_ring_says(measured):
    """Gloo's all-reduces and all-gathers are rings. Its reduce-scatter is an
    all-reduce: twice the bytes of NCCL's."""
    for variant, found in measured[1].items():
        wanted = found["sent"] + found.get("_reduce_scatter_base_", 0.0)
        assert found["sockets"] == pytest.approx(wanted, rel=0.05), variant


def test_memory_is_what_ranks_allocate(measured):
    """Weights, optimiser, momentum copy and queue between steps, and with the gradients in the update,
    within 5 % (10 % with offload, whose buffers of the largest parameter weigh much in a small model); the
    peak with activations within 15 %."""
    ranks, records = measured
    for variant, found in records.items():
        plan = make_plan(variant, ranks)
        # The test's images.
        parts, held = memory(plan), plan.recipe.runtime.accumulation * (PAIRS * 3 * 64 * 64 * 4)
        shard = parts["optimiser"] / 2  # of gradients, which offloaded ones have in host memory at any time
        held += sum(parts[name] for name in ("weights", "optimiser", "momentum", "queue")) + host_memory(plan)
        held += parts["gradients"] if plan.stage == 3 else 0
        within = 0.1 if plan.recipe.runtime.offload else 0.05
        assert found["after"] == pytest.approx(held, rel=within), variant
        assert found["update"] == pytest.approx(held + shard, rel=within), variant
        peak = sum(parts.values()) + host_memory(plan) + found["after"] - held
        assert found["peak"] == pytest.approx(peak, rel=0.15), variant


def test_what_deepspeed_is_taken_to_do_by_default():
    from blip_train.forecast import estimate
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = DeepSpeedZeroConfig(stage=3)
    assert (config.prefetch_bucket_size, config.max_reuse_distance) == (estimate.PREFETCH,
                                                                        estimate.REUSE_DISTANCE)


def test_optimiser_and_gradients_shrink_with_the_ranks():
    """The textbook's division (ZeRO, section 5): of states from stage 1, of weights in stage 3."""
    plans = {stage: [memory(dataclasses.replace(make_plan("0 local", n), stage=stage)) for n in (1, 64)]
             for stage in range(4)}
    for stage, (one, many) in plans.items():
        assert many["optimiser"] / one["optimiser"] == pytest.approx(1 if stage == 0 else 1 / 64, rel=0.01)
        assert many["weights"] / one["weights"] == pytest.approx({0: 1, 1: 0.51, 2: 0.51, 3: 1 / 64}[stage],
                                                                 rel=0.02)
