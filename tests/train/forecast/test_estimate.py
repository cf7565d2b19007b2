"""Formulas for a step's parameters, FLOPs and activations against counts: by hand,
by PyTorch, by live storages."""

from __future__ import annotations

import dataclasses
import importlib

import blip_kernels.flops  # noqa: F401 (registers the counts)
import pytest
import torch
from blip_train.forecast.estimate import Plan, forecast, gathered, memory, meta_pretraining, traffic
from blip_train.forecast.gpus import GPUS, gpu_of
from blip_train.forecast.step_costs import BatchSizes as Sizes
from blip_train.forecast.step_costs import step_work
from blip_train.recipe import Recipe, RuntimeRecipe, TokenizerRecipe, load_recipe
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from counting import Counting
from scaling_tables import DOC, plans, tables, written
from torch.utils.flop_counter import FlopCounterMode

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts

RECIPES = "train/blip_train/recipes"
CONFIG = BlipConfig(vision=VisionConfig(image_size=96, width=128, layers=3, heads=4), embed_dim=32,
                    text=TextConfig(vocab_size=500, width=64, layers=4, heads=2, mlp_width=256, dropout=0.0),
                    tokens=SpecialTokens(0, 1, 2, 3, 4))
PAIRS, TOKENS = 6, 14


@pytest.mark.parametrize(("name", "vision_width", "vision_layers"), [("base", 768, 12), ("large", 1024, 24)])
def test_parameters_by_hand(name, vision_width, vision_layers):
    """From the paper's sizes (BLIP section 3.1): ViT-B or ViT-L at 224 px, BERT-base
    shared but for self-attention."""
    recipe = load_recipe(f"{RECIPES}/pretrain_{name}.yaml")
    plan = Plan(recipe, meta_pretraining(recipe), ranks=8, stage=1)
    d, t, vocabulary = vision_width, 768, 30524
    linear = lambda a, b: a * b + b  # noqa: E731
    vision = (linear(3 * 16 * 16, d) + 197 * d + d  # patches, positions, [CLS]
              + vision_layers * (linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
                                 + 4 * d) + 2 * d)
    embeddings = vocabulary * t + 512 * t + 2 * t
    self_attention = 4 * linear(t, t) + 2 * t
    feed_forward = linear(t, 4 * t) + linear(4 * t, t) + 2 * t
    cross_attention = 2 * linear(t, t) + 2 * linear(d, t) + 2 * t
    heads = linear(d, 256) + linear(t, 256)
    text = embeddings + 12 * (2 * self_attention + cross_attention + feed_forward)
    lm_head = linear(t, t) + 2 * t + vocabulary
    # And ITM's head, the temperature.
    assert sum(plan.trained) == vision + text + lm_head + heads + linear(t, 2) + 1
    assert sum(plan.momentum) == vision + embeddings + 12 * (self_attention + feed_forward) + heads + 1


def make(precision: str, recomputed: int, losses=("itc", "itm", "lm")) -> tuple[Plan, Pretraining, Batch]:
    objective = Objective(queue_size=1000, losses=losses)
    recipe = Recipe(model=CONFIG, objective=objective, tokenizer=TokenizerRecipe(vocab_size=500),
                    runtime=RuntimeRecipe(
        batch_size=PAIRS, precision=precision, recomputed_blocks=recomputed))
    torch.manual_seed(0)
    pretraining = Pretraining(BlipModel(CONFIG), objective, seed=0)
    pretraining.model.recompute(recomputed)
    texts = PackedTexts.from_lists([[1, *torch.randint(5, 500, (TOKENS - 2,)).tolist(), 2]
                                    for _ in range(PAIRS)])
    batch = Batch(torch.randn(PAIRS, 3, 96, 96), texts, torch.arange(PAIRS))
    return Plan(recipe, meta_pretraining(recipe), 1, 0, TOKENS), pretraining, batch


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention and LM's loss keep what their kernels keep: neither attention weights nor logits."""
    monkeypatch.setenv("BLIP_FAST_ATTENTION", "reference")
    loss = importlib.import_module("blip_kernels.linear_cross_entropy")
    monkeypatch.setattr(loss, "PLAIN", 0)
    monkeypatch.setattr(loss, "KEPT", 0)


@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize("losses", [("lm",), ("itc",), ("itc", "itm"), ("itc", "itm", "lm")], ids="+".join)
def test_flops(as_on_a_gpu, recomputed, losses):
    plan, pretraining, batch = make("float32", recomputed, losses)
    with FlopCounterMode(display=False) as counter:
        pretraining(batch, StepContext(alpha=0.4)).total.backward()
    assert plan.work.forward + plan.work.backward == counter.get_total_flops()


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations(as_on_a_gpu, precision, recomputed):
    """What is alive between forward and backward, within 2 % (4 % where
    blocks are computed again)."""
    with Counting() as counting:
        plan, pretraining, batch = make(precision, recomputed)
        before = counting.alive()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = pretraining(batch, StepContext(alpha=0.4))
        alive = counting.alive() - before
    one_block = (make(precision, 0)[0].work.saved - step_work(
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, layers=2)),
        plan.recipe.objective, plan.batch).saved)  # is there only while it is computed again
    assert plan.work.saved - one_block * bool(recomputed) == pytest.approx(
        alive, rel=0.04 if recomputed else 0.02)
    del output


@pytest.mark.slow
def test_activations_of_the_base_model(as_on_a_gpu):
    """At 224 px; the published sizes."""
    recipe = load_recipe(f"{RECIPES}/pretrain_base.yaml",
                         ["--runtime.batch_size=2", "--model.text.dropout=0"])
    plan = Plan(recipe, meta_pretraining(recipe), 1, 0)
    with Counting() as counting:
        pretraining = Pretraining(BlipModel(recipe.model), recipe.objective, seed=0)
        texts = PackedTexts.from_lists([[101, *torch.randint(1000, 30000, (12,)).tolist(), 102]
                                        for _ in range(2)])
        batch = Batch(torch.randn(2, 3, 224, 224), texts, torch.arange(2))
        before = counting.alive()
        with torch.autocast("cpu", torch.bfloat16):
            output = pretraining(batch, StepContext(alpha=0.4))
        assert plan.work.saved == pytest.approx(counting.alive() - before, rel=0.02)
    del output


def test_a_step_of_the_base_model_takes_199_gflop_a_pair():
    """As tests/kernels/test_flops.py counts it: eight captions of 13.9 tokens; the
    published code takes 306.6."""
    work = step_work(BlipConfig(), Objective(), Sizes(8, 111))
    assert (work.forward + work.backward) / 8 == pytest.approx(199.2e9, rel=0.005)


def test_the_base_model_is_gathered_once_a_step_and_the_large_one_partly_twice():
    """ZeRO 3 with DeepSpeed's defaults: the base model's backward starts before
    10⁹ elements have been read."""
    plans = []
    for name in ("base", "large"):
        recipe = load_recipe(f"{RECIPES}/pretrain_{name}.yaml")
        plans.append(Plan(recipe, meta_pretraining(recipe), 8, 3))
    everything = [sum(plan.trained) + sum(plan.momentum) for plan in plans]
    assert gathered(plans[0])[0] == everything[0]
    assert everything[1] < gathered(plans[1])[0] < 2 * everything[1]


def test_a_forecast_follows_the_data_sheet():
    recipe = load_recipe(f"{RECIPES}/pretrain_base.yaml")
    pretraining = meta_pretraining(recipe)
    a100, h100 = (forecast(Plan(recipe, pretraining, 8, 1), gpu) for gpu in GPUS[:2])
    work = Plan(recipe, pretraining, 8, 1).work
    assert a100.products == pytest.approx((work.forward + work.backward) / 312e12 / 0.5)
    assert a100.products / h100.products == pytest.approx(989 / 312)
    assert a100.expected < a100.bound < h100.bound
    alone = Plan(recipe, pretraining, 1, 1)
    assert sum(traffic(alone).values()) == forecast(alone, GPUS[0]).communication == 0


def test_accumulation_and_precision():
    """Four batches per step: ZeRO 1 exchanges gradients once, ZeRO 2 and 3 each time.
    float32 keeps nearly twice."""
    def plan(stage: int, *options: str) -> Plan:
        recipe = load_recipe(f"{RECIPES}/pretrain_base.yaml", list(options))
        return Plan(recipe, meta_pretraining(recipe), 8, stage)

    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        one, four = (traffic(plan(stage, f"--runtime.accumulation={n}"))["gradients"] for n in (1, 4))
        assert four == times * one
    half, full = (memory(plan(1, f"--runtime.precision={name}")) for name in ("bfloat16", "float32"))
    assert 1.5 < full["activations"] / half["activations"] < 2


def test_gpus_by_the_name_that_pytorch_gives():
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"]
    assert [gpu_of(name) for name in names] == GPUS
    assert [gpu_of(name) for name in ("NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA H100 NVL")] == [None] * 3


def test_the_tables_of_the_documentation_are_these():
    assert written() == tables()
    for size in ("base", "large"):
        plan = plans(size)[8, 0]
        figures = f"*P* = {sum(plan.trained) / 1e6:.1f} M, *M* = {sum(plan.momentum) / 1e6:.1f} M"
        assert figures in DOC.read_text()
