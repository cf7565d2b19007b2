"""Freezing by name, and LoRA adapters by peft: what is trained, gradients, merging,
peft's own format, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blip_train import prepare
from blip_train.adapters import adapt, merged, save_adapters
from blip_train.engine.adamw import parameter_groups
from blip_train.freezing import freeze, named_below
from blip_train.recipe import AdapterRecipe, OptimizerRecipe, Recipe
from blip_train.steps.answering import Answering
from blip_train.steps.pretraining import Objective, Pretraining
from blip_train.steps.step import StepContext
from small_pretraining import CONFIG, make_batch, make_model

from blip_fast.model.blip import BlipModel

OBJECTIVE = Objective(queue_size=23, momentum=0.9)
ADAPTERS = AdapterRecipe(rank=2, alpha=3,
                         targets=(*AdapterRecipe().targets, "text.tied.image_to_kv", "lm_head"))


def adapted(seed: int = 1) -> Pretraining:
    """A step whose adapters compute something: B starts at zero."""
    torch.manual_seed(seed)
    step = Pretraining(make_model(), OBJECTIVE, seed=3)
    adapt(step, ADAPTERS)
    with torch.no_grad():
        for name, parameter in step.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return step


def outputs(model: BlipModel) -> list[torch.Tensor]:
    """Every path through the text stack: unimodal (last layer only for first rows), matching, decoding."""
    batch = make_batch(0, 0)
    embeds, which = model.encode_images(batch.images), torch.arange(len(batch.ids))
    kv = model.stack("encoder").image_kv(embeds)
    return [model.image_features(embeds), model.text_features(batch.texts),
            model.match_logits(batch.texts, which, kv),
            model.lm_logits(batch.texts.with_first(30522), which, kv)]


def assert_same_outputs(one: BlipModel, two: BlipModel) -> None:
    for ours, theirs in zip(outputs(one), outputs(two), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_patterns_are_first_parts():
    names = [name for name, _ in make_model().named_parameters()]
    blocks = named_below(["vision.blocks.1-7"], names, "option")
    assert blocks == [name for name in names if name.startswith("vision.blocks.1.")]
    assert named_below(["text.*"], names, "option") == [name for name in names if name.startswith("text.")]
    norms = {f"{part}.norm.{kind}" for part in ("vision", "lm_head") for kind in ("weight", "bias")}
    assert set(named_below(["temperature", "*.norm"], names, "option")) == {"temperature", *norms}
    with pytest.raises(ValueError, match=r"option: 'vision.block.0' names nothing in this model, whose parts "
                                          "are temp"):
        named_below(["text.*", "vision.block.0"], names, "option")


def test_frozen_weights_stay_bit_for_bit():
    """Frozen weights get no gradient and no weight decay; the momentum copy equals them."""
    step = Pretraining(make_model(), OBJECTIVE, seed=3)
    freeze(step, ["vision.blocks.0", "text.tied.word_embeds", "text.*.layers.*.self_attention"])
    before = {name: parameter.clone() for name, parameter in step.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(step, OptimizerRecipe(weight_decay=0.5)), lr=0.1)
    for number in range(2):
        step.follow()
        step(make_batch(number, 0), StepContext(alpha=0.4)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {name.removeprefix("model.") for name, parameter in step.named_parameters()
            if name.startswith("model.") and torch.equal(parameter, before[name])}
    assert same == {name for name, _ in step.model.named_parameters()
                    if name.startswith(("vision.blocks.0.", "text.tied.word_embeds."))
                    or ".self_attention." in name}
    name = "vision.blocks.0.qkv.weight"
    assert torch.equal(step.momentum.copy.get_parameter(name), step.model.get_parameter(name))
    with pytest.raises(ValueError, match="names the whole model"):
        freeze(step, ["*"])


def test_adapters_alone_are_trained_and_the_copy_follows_them():
    step = adapted()
    before = {name: parameter.clone() for name, parameter in step.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(step, OptimizerRecipe()), lr=0.1)
    step.follow()
    step(make_batch(0, 0), StepContext(alpha=0.4)).total.backward()
    optimizer.step()
    step.follow()
    moved = {name for name, parameter in step.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    averages = dict(step.momentum.copy.named_parameters())
    name = "text.encoder.layers.0.self_attention.encoder.qkv.lora_A.default.weight"
    start, now = (weights["model." + name.replace("encoder", "tied", 1)] for weights in
                  (before, dict(step.named_parameters())))
    torch.testing.assert_close(averages[name], 0.9 * start + 0.1 * now)
    assert sum(".lora_A." in name for name in averages) == 2 + 2  # vision and text, two layers each


def test_the_merged_model_computes_the_same():
    step = adapted()
    whole = merged(step.model)
    plain = make_model()
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert_same_outputs(step.model, whole)
    for ours, without in zip(outputs(whole), outputs(plain), strict=True):
        assert (ours - without).abs().max() > 1e-3


def test_gradients_are_those_of_the_merged_weights():
    """W' = W + s B A, so dB = s dW' Aᵀ and dA = s Bᵀ dW'. A path without its adapter would lack its part."""
    step = adapted()
    whole = merged(step.model)
    for model in (step.model, whole):
        for parameter in model.parameters():
            parameter.grad = None
    torch.manual_seed(0)
    mixture = [torch.randn_like(x) for x in outputs(whole)]
    for model in (step.model, whole):
        sum((x * weight).sum() for x, weight in zip(outputs(model), mixture, strict=True)).backward()
    dense, checked = dict(whole.named_parameters()), 0
    for name, module in step.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b, d = module.lora_A["default"].weight, module.lora_B["default"].weight, dense[f"{name}.weight"].grad
            for ours, wanted in ((b.grad, 1.5 * d @ a.T), (a.grad, 1.5 * b.T @ d)):
                assert (ours - wanted).norm() <= 1e-4 * wanted.norm() and wanted.norm() > 0, name
            checked += 1
    # qkv of vision; of both modes and the query, in two layers; image_to_kv, lm_head.
    assert checked == 2 + 2 * 3 + 2


def test_peft_reads_what_was_saved(tmp_path):
    from peft import PeftModel

    step = adapted()
    save_adapters(step.model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert_same_outputs(loaded.base_model.model, step.model)


def test_targets_that_cannot_be_adapted():
    config = replace(CONFIG, text_stacks="untied", contrastive=False, matching=False, tied_lm_head=False)
    with pytest.raises(ValueError, match=r"lm_head\.projection, whose weight the loss reads"):
        adapt(Answering(BlipModel(config), 0.1), AdapterRecipe(targets=("lm_head",)))
    with pytest.raises(ValueError, match=r"linear layers.*'vision.patch_embed' names nothing"):
        adapt(Answering(BlipModel(config), 0.1), AdapterRecipe(targets=("vision.patch_embed",)))


def test_adapters_ask_for_peft_and_a_checkpoint(monkeypatch):
    with pytest.raises(ValueError, match="adapters are set but init is not"):
        Recipe(adapters=AdapterRecipe())
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adapters need peft.*: pip install 'blip-fast\[peft\]'"):
        prepare.check_sources(Recipe(adapters=AdapterRecipe(), init="x"))
