"""NLVR2's first weights: an ordinary model whose cross-attention becomes both of the twins (BLIP section
5.4)."""

from __future__ import annotations

import dataclasses
import re

import torch

from blip_fast.model.blip import BlipModel


def reasoning_model(model: BlipModel, seed: int) -> BlipModel:
    """A new NLVR2 model with the image encoder and text encoder of `model`.

    Each of the two eyes starts as a copy of the one cross-attention. The layers that merge them and the head
    have no counterpart: they are drawn from `seed`.

    Raises:
        ValueError: the model has no text encoder with cross-attention.
    """
    config = model.config
    if not config.has_encoder or not config.text.cross_attention:
        raise ValueError("NLVR2 starts from a model with an image-grounded text encoder: take a pre-training "
                         "or retrieval checkpoint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twins = BlipModel(dataclasses.replace(
            config, text_stacks="encoder", contrastive=False, matching=False, reasoning=True,
            text=dataclasses.replace(config.text, twin_cross_attention=True)))
    own = model.state_dict()
    stack = "text.tied." if config.text_stacks == "tied" else "text.encoder."
    weights = twins.state_dict()
    for name in weights:
        source = re.sub(r"(query|out|image_to_kv)\.1\.", r"\1.0.", name).replace("text.encoder.", stack)
        if source in own:
            weights[name] = own[source]
        elif "merge" not in name and not name.startswith("reasoning_head."):
            raise AssertionError(f"{name} has no source and is not new")
    twins.load_state_dict(weights)
    return twins.to(own["vision.cls_token"].dtype).eval()
