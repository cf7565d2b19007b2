"""The published `.pth`: `{"model": state dict}` and nothing about sizes.

Sizes come from the shapes of the tensors. What shapes do not say (heads, norm eps, dropout, token ids) comes
from a JSON file next to it, `NAME.json` for `NAME.pth`, with the keys of the published configs in
`text_config` and `vit_config`. Without it a head is 64 wide and the rest is as in BLIP base.
`NAME.tokenizer/` may hold the tokenizer.

Pre-training and retrieval checkpoints carry training state: momentum copies (`visual_encoder_m.…`) and
queues.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_fast.checkpoint.files import (
    naming_config,
    read_json,
    read_pickle,
    state_dict,
    whole_file,
    write_json,
)
from blip_fast.checkpoint.names import Stored, has_tied_lm_head, original_layout
from blip_fast.model.blip import INITIAL_TEMPERATURE, BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.tokenizer import Tokenizer

QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
HEAD_WIDTH = 64


def read(path: Path, heads: int | None, tokens: SpecialTokens) -> Stored:
    """Read a `.pth`, training state left out.

    `heads` is the number of attention heads, image and text alike; `tokens` are the tokenizer's special
    tokens.

    Raises ValueError where the file is no BLIP checkpoint, or widths leave the number of heads open.
    """
    tensors = {key: value for key, value in read_all(path).items() if not is_training_state(key)}
    with naming_config(path.with_suffix(".json")):
        config = _infer_config(tensors, _published_json(path), heads, tokens, path)
    if config.contrastive:  # the published inference class stores none
        tensors.setdefault("temp", torch.tensor(INITIAL_TEMPERATURE))
    return Stored(config, original_layout(config), tensors)


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.pth`."""
    content = read_pickle(path)
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} is no published BLIP checkpoint: it must hold {{'model': state dict}}")
    return state_dict(content["model"], path)


def is_training_state(key: str) -> bool:
    return key in QUEUES or key.split(".")[0].endswith("_m")


def tokenizer_directory(path: Path) -> Path:
    return path.with_suffix(".tokenizer")


def save_original(model: BlipModel, tokenizer: Tokenizer | None, path: str | Path,
                  training_state: dict[str, Tensor] | None = None) -> None:
    """Write a `.pth` that the published code loads, `NAME.json` next to it and, if given, the tokenizer.

    `training_state` (from `load_training_state`) goes back under its published names. A temperature that was
    never trained is left out, as in files of the published inference class: it reads back the same.
    """
    path = Path(path)
    layout = original_layout(model.config)
    tensors = layout.split(model.state_dict())
    tensors |= layout.stored_twice(tensors)
    untrained = model.config.contrastive and not training_state
    if untrained and tensors["temp"] == torch.tensor(INITIAL_TEMPERATURE):
        del tensors["temp"]
    with whole_file(path) as partial:
        torch.save({"model": tensors | (training_state or {})}, partial)
    if tokenizer is not None:
        tokenizer.save(tokenizer_directory(path))
    write_json(_published_config(model.config), path.with_suffix(".json"))


def _published_json(path: Path) -> dict[str, Any]:
    """The JSON file next to a `.pth`; empty if there is none."""
    file = path.with_suffix(".json")
    return read_json(file) if file.is_file() else {}


def _infer_config(tensors: dict[str, Tensor], published: dict[str, Any], heads: int | None,
                  tokens: SpecialTokens, path: Path) -> BlipConfig:
    has = {part for part in ("text_encoder", "text_decoder", "vision_proj", "itm_head", "cls_head")
           if any(key.startswith(part + ".") for key in tensors)}
    stack = "text_encoder" if "text_encoder" in has else "text_decoder.bert"
    if not has & {"text_encoder", "text_decoder"}:
        raise ValueError(f"{path} is no BLIP checkpoint: it holds neither a text encoder nor a text decoder")
    stacks = "encoder" if "text_decoder" not in has else "decoder" if "text_encoder" not in has else None
    embed_dim = {}
    if "vision_proj" in has:
        embed_dim["embed_dim"] = _shape(tensors, "vision_proj.weight", 2, path)[0]
    return BlipConfig(
        vision=_infer_vision(tensors, published.get("vit_config", {}), heads, path),
        text=_infer_text(tensors, stack, published.get("text_config", {}), heads, path),
        tokens=SpecialTokens(**published["special_tokens"]) if "special_tokens" in published else tokens,
        text_stacks=stacks or ("tied" if _is_tied(tensors) else "untied"),
        contrastive="vision_proj" in has, matching="itm_head" in has, reasoning="cls_head" in has,
        tied_lm_head=has_tied_lm_head(tensors), **embed_dim,
    )


def _infer_vision(tensors: dict[str, Tensor], published: dict[str, Any], heads: int | None,
                  path: Path) -> VisionConfig:
    _, tokens, width = _shape(tensors, "visual_encoder.pos_embed", 3, path)
    patch_size = _shape(tensors, "visual_encoder.patch_embed.proj.weight", 4, path)[-1]
    return VisionConfig(
        image_size=patch_size * round((tokens - 1) ** 0.5), patch_size=patch_size, width=width,
        layers=_layers(tensors, "visual_encoder.blocks"),
        heads=_heads(width, heads or published.get("num_heads"), "vision", path),
        mlp_ratio=_shape(tensors, "visual_encoder.blocks.0.mlp.fc1.weight", 2, path)[0] / width,
        norm_eps=published.get("layer_norm_eps", VisionConfig.norm_eps),
        drop_path=published.get("drop_path_rate", VisionConfig.drop_path),
    )


def _infer_text(tensors: dict[str, Tensor], stack: str, published: dict[str, Any], heads: int | None,
                path: Path) -> TextConfig:
    vocab_size, width = _shape(tensors, f"{stack}.embeddings.word_embeddings.weight", 2, path)
    return TextConfig(
        vocab_size=vocab_size, width=width, layers=_layers(tensors, f"{stack}.encoder.layer"),
        heads=_heads(width, heads or published.get("num_attention_heads"), "text", path),
        mlp_width=_shape(tensors, f"{stack}.encoder.layer.0.intermediate.dense.weight", 2, path)[0],
        max_positions=_shape(tensors, f"{stack}.embeddings.position_embeddings.weight", 2, path)[0],
        norm_eps=published.get("layer_norm_eps", TextConfig.norm_eps),
        dropout=published.get("hidden_dropout_prob", TextConfig.dropout),
        twin_cross_attention=any(".crossattention.self0." in key for key in tensors),
    )


def _shape(tensors: dict[str, Tensor], key: str, axes: int, path: Path) -> torch.Size:
    """The shape of a tensor that sizes are read from."""
    if key not in tensors:
        raise ValueError(f"{path} is no whole BLIP checkpoint: missing: {key}")
    shape = tensors[key].shape
    if len(shape) != axes:
        raise ValueError(f"{path} is no BLIP checkpoint: misshapen: {key} {list(shape)} must have {axes} "
                         "axes")
    return shape


def _layers(tensors: dict[str, Tensor], prefix: str) -> int:
    numbers = [int(match[1]) for key in tensors if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _heads(width: int, heads: int | None, part: str, path: Path) -> int:
    if heads is None and width % HEAD_WIDTH:
        raise ValueError(f"{path}: the {part} width {width} is no multiple of {HEAD_WIDTH}, the width of "
                         "BLIP's heads: say how many heads there are (--heads, or "
                         f"{path.with_suffix('.json').name} next to it)")
    return heads or width // HEAD_WIDTH


def _is_tied(tensors: dict[str, Tensor]) -> bool:
    """Whether the decoder repeats the encoder in everything but self-attention, as in pre-training."""
    shared = [key for key in tensors if key.startswith("text_decoder.bert.") and ".attention." not in key]
    pairs = [(tensors[key], tensors.get(key.replace("text_decoder.bert", "text_encoder", 1)))
             for key in shared]
    return all(encoders is not None and torch.equal(decoders, encoders) for decoders, encoders in pairs)


def _published_config(config: BlipConfig) -> dict[str, Any]:
    text, vision, tokens = config.text, config.vision, config.tokens
    return {
        "text_config": {
            "vocab_size": text.vocab_size, "hidden_size": text.width, "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "layer_norm_eps": text.norm_eps,
            "max_position_embeddings": text.max_positions, "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout, "encoder_width": vision.width,
        },
        "vit_config": {
            "img_size": vision.image_size, "patch_size": vision.patch_size, "embed_dim": vision.width,
            "depth": vision.layers, "num_heads": vision.heads, "mlp_ratio": vision.mlp_ratio,
            "layer_norm_eps": vision.norm_eps, "drop_path_rate": vision.drop_path,
        },
        "special_tokens": {"pad": tokens.pad, "cls": tokens.cls, "sep": tokens.sep, "bos": tokens.bos,
                           "enc": tokens.enc},
    }
