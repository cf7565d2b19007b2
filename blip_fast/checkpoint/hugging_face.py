"""The layout of transformers: `config.json` and the weights of one of its three BLIP classes.

| class                        | text_stacks | heads                 |
|------------------------------|-------------|-----------------------|
| BlipForConditionalGeneration | decoder     |                       |
| BlipForQuestionAnswering     | untied      |                       |
| BlipForImageTextRetrieval    | encoder     | contrastive, matching |

transformers knows no temperature, no [CLS] and [ENC] ids and no stochastic depth. We store them in
`config.json` under names of our own (`itc_temperature`, `cls_token_id`, `enc_token_id`, `drop_path_rate`),
which transformers keeps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip_fast.checkpoint.files import naming_config, read_weights, write_json, write_tensors
from blip_fast.checkpoint.names import LM_HEAD, Stored, has_tied_lm_head, hugging_face_layout
from blip_fast.media.images import MEAN, STD
from blip_fast.model.blip import INITIAL_TEMPERATURE, BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.tokenizer import Tokenizer

CLASSES: dict[str, dict[str, Any]] = {
    "BlipForConditionalGeneration": {"text_stacks": "decoder", "contrastive": False, "matching": False},
    "BlipForQuestionAnswering": {"text_stacks": "untied", "contrastive": False, "matching": False},
    "BlipForImageTextRetrieval": {"text_stacks": "encoder", "contrastive": True, "matching": True},
}
# Defaults of transformers for fields that config.json leaves out.
TEXT_DEFAULTS = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102,
}
VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 384, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "drop_path_rate": 0.0,
}


def read(source: str | Path, content: dict[str, Any], tokens: SpecialTokens) -> Stored:
    """Read a directory or Hub model whose config.json holds `content`. `tokens` are the tokenizer's special
    tokens.

    Raises ValueError where the class is not one of the three, or the config asks for what BLIP does not have.
    """
    with naming_config(source):
        config = _to_config(content, tokens, source)
    tensors = read_weights(source)
    # config.json may say tied where older transformers trained the two apart; transformers 5 too trusts the
    # tensors.
    config = replace(config, tied_lm_head=has_tied_lm_head(tensors))
    if (bias := tensors.get(f"{LM_HEAD}.decoder.bias")) is not None:
        tensors[f"{LM_HEAD}.bias"] = bias  # both may be stored; transformers computes with this one
    if config.contrastive:
        tensors["temp"] = torch.tensor(content.get("itc_temperature", INITIAL_TEMPERATURE))
    return Stored(config, hugging_face_layout(config), tensors)


def save_hugging_face(model: BlipModel, tokenizer: Tokenizer | None, directory: str | Path) -> None:
    """Write a directory that transformers loads: config, weights, image processor and, if given, tokenizer
    files.

    Raises ValueError where none of its classes holds all the parts of the model; the message names them.
    """
    directory, config = Path(directory), model.config
    architecture = class_for(config)
    tensors = hugging_face_layout(config).split(model.state_dict())
    temperature = tensors.pop("temp", None)
    # transformers 5 then does not tie the two biases either
    if config.has_decoder and not config.tied_lm_head:
        tensors[f"{LM_HEAD}.decoder.bias"] = tensors[f"{LM_HEAD}.bias"].clone()
    content = _from_config(config, architecture)
    if temperature is not None:
        content["itc_temperature"] = float(temperature)
    content["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, directory / "model.safetensors")
    write_json(_image_processor(config.vision.image_size), directory / "preprocessor_config.json")
    if tokenizer is not None:
        tokenizer.save(directory)
    write_json(content, directory / "config.json")


def class_for(config: BlipConfig) -> str:
    """The class of transformers that holds exactly the parts of a model. Raises ValueError where there is
    none."""
    has = {"text_stacks": config.text_stacks, "contrastive": config.contrastive, "matching": config.matching}
    for architecture, parts in CLASSES.items():
        if has == parts and not config.reasoning and config.text.cross_attention:
            return architecture
    heads = [name for name in ("contrastive", "matching", "reasoning") if getattr(config, name)]
    raise ValueError(f"transformers has no BLIP class for a model with text_stacks={config.text_stacks!r} "
                     f"and {' and '.join(heads) or 'no'} heads: keep the parts of one task first (--task "
                     "caption, match or answer)")


def _to_config(content: dict[str, Any], tokens: SpecialTokens, source: str | Path) -> BlipConfig:
    architecture = (content.get("architectures") or ["no class"])[0]
    if architecture not in CLASSES:
        raise ValueError(f"{source}: config.json names {architecture}: one of {', '.join(CLASSES)} is needed")
    text = TEXT_DEFAULTS | (content.get("text_config") or {})
    vision = VISION_DEFAULTS | (content.get("vision_config") or {})
    for part, values in (("text", text), ("vision", vision)):
        if values["hidden_act"] != "gelu":
            raise ValueError(f"{source}: {part}_config.hidden_act is {values['hidden_act']!r}: BLIP's is "
                             "'gelu'")
    return BlipConfig(
        vision=VisionConfig(
            image_size=_side(vision["image_size"], "image_size", source),
            patch_size=_side(vision["patch_size"], "patch_size", source), width=vision["hidden_size"],
            layers=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"], norm_eps=vision["layer_norm_eps"],
            drop_path=vision["drop_path_rate"],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"], width=text["hidden_size"], layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"], mlp_width=text["intermediate_size"],
            max_positions=text["max_position_embeddings"], norm_eps=text["layer_norm_eps"],
            dropout=text["hidden_dropout_prob"],
        ),
        tokens=SpecialTokens(
            pad=text["pad_token_id"], bos=text["bos_token_id"], sep=text["sep_token_id"],
            cls=text.get("cls_token_id", tokens.cls), enc=text.get("enc_token_id", tokens.enc),
        ),
        embed_dim=content.get("image_text_hidden_size", 256),
        **CLASSES[architecture],
    )


def _side(size: int | list[int], name: str, source: str | Path) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{source}: vision_config.{name} is {size}: BLIP's images and patches are square")
    return sides.pop()


def _from_config(config: BlipConfig, architecture: str) -> dict[str, Any]:
    text, vision, tokens = config.text, config.vision, config.tokens
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "image_text_hidden_size": config.embed_dim,
        "tie_word_embeddings": config.tied_lm_head,
        "text_config": {
            "model_type": "blip_text_model", "vocab_size": text.vocab_size, "hidden_size": text.width,
            "encoder_hidden_size": vision.width, "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions, "hidden_act": "gelu",
            "layer_norm_eps": text.norm_eps, "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "pad_token_id": tokens.pad, "bos_token_id": tokens.bos, "sep_token_id": tokens.sep,
            "eos_token_id": tokens.sep, "cls_token_id": tokens.cls, "enc_token_id": tokens.enc,
            "tie_word_embeddings": config.tied_lm_head,
        },
        "vision_config": {
            "model_type": "blip_vision_model", "hidden_size": vision.width,
            "intermediate_size": round(vision.width * vision.mlp_ratio), "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads, "image_size": vision.image_size,
            "patch_size": vision.patch_size, "hidden_act": "gelu", "layer_norm_eps": vision.norm_eps,
            "drop_path_rate": vision.drop_path,
        },
    }


def _image_processor(image_size: int) -> dict[str, Any]:
    """BLIP's evaluation transform in transformers' words."""
    return {
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"height": image_size, "width": image_size},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(MEAN), "image_std": list(STD),
    }
