"""transformers' BLIP with a textbook model's weights."""

from __future__ import annotations

import transformers
from torch import nn

from .model import Sizes

TRANSFORMERS_NAMES = [
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    ("visual_encoder.blocks", "vision_model.encoder.layers"),
    ("visual_encoder.norm", "vision_model.post_layernorm"),
    (".attn.proj", ".self_attn.projection"),
    (".attn.qkv", ".self_attn.qkv"),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
]


def transformers_name(name: str) -> str:
    for ours, theirs in TRANSFORMERS_NAMES:
        name = name.replace(ours, theirs)
    return name


def transformers_config(sizes: Sizes) -> transformers.BlipConfig:
    text = {
        "hidden_size": sizes.text_width,
        "encoder_hidden_size": sizes.vision_width,
        "intermediate_size": sizes.text_feed_forward,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "max_position_embeddings": sizes.positions,
        "vocab_size": sizes.vocabulary,
        "label_smoothing": 0.1,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "layer_norm_eps": 1e-6,
    }
    return transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=sizes.projection)


def transformers_twin(kind: str, model: nn.Module, sizes: Sizes) -> nn.Module:
    """transformers' model of the given class with our model's weights."""
    twin = getattr(transformers, kind)(transformers_config(sizes)).eval()
    state = {transformers_name(k): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    twin.load_state_dict(state)
    return twin
