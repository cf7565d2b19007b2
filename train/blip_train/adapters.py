"""Low-rank adapters (LoRA, Hu et al. 2021) by peft: W + alpha / rank · B A. W is
frozen; only A and B are trained.

The momentum copy has its own adapters, which follow the model's. peft is imported
only if adapters are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from blip_fast.checkpoint.files import write_tensors
from blip_fast.model.blip import BlipModel
from blip_train.freezing import named_below
from blip_train.recipe import AdapterRecipe
from blip_train.steps.step import TrainingStep

ADAPTER = "default"  # peft's name for a model's only adapter
# The loss reads its weight directly, so an adapter would have no effect.
READ_BY_THE_LOSS = "lm_head.projection"


def adapt(step: TrainingStep, recipe: AdapterRecipe) -> None:
    """Put adapters into the model, and into its momentum copy if there is one. Everything else is frozen.

    Raises ValueError if a target names no linear layer, or one on which an adapter would have no effect.
    """
    linears = [name for name, module in step.model.named_modules() if isinstance(module, nn.Linear)]
    targets = named_below(recipe.targets, linears, "adapters.targets (linear layers)")
    if READ_BY_THE_LOSS in targets:
        raise ValueError(f"adapters.targets names {READ_BY_THE_LOSS}, whose weight the loss reads past the "
                         "layer: an adapter there would have no effect, leave it out")
    _inject(step.model, targets, recipe)
    if (state := step.momentum_state()) is not None:
        encoders, copy = state.encoders, state.encoders.copy
        copied = {name: encoders.followed(name) for name, _ in copy.named_modules()}
        _inject(copy, [name for name, source in copied.items() if source in targets], recipe)
        copy.requires_grad_(False)
        followed = step.model.state_dict()
        copy.load_state_dict({name: followed[encoders.followed(name)] for name in copy.state_dict()
                              if ".lora_" in name}, strict=False)


def merged(model: BlipModel) -> BlipModel:
    """A model without adapters that computes the same, with weights W + alpha / rank · B A."""
    from peft.tuners.lora import Linear

    products = {f"{name}.weight": module.get_delta_weight(ADAPTER) for name, module in model.named_modules()
                if isinstance(module, Linear)}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            weights[plain] = (tensor + products[plain] if plain in products else tensor).detach()
    with torch.device("meta"):
        whole = BlipModel(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole.train(model.training)


def save_adapters(model: BlipModel, directory: Path) -> None:
    """Write the adapters in peft's own format: `PeftModel.from_pretrained(initial
    model, directory)` reads them."""
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    write_tensors({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
                  directory / "adapter_model.safetensors")
    model.peft_config[ADAPTER].save_pretrained(str(directory))  # type: ignore[index]


def _inject(model: BlipModel, targets: Sequence[str], recipe: AdapterRecipe) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if targets:
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(targets))  # pyright: ignore
        inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
