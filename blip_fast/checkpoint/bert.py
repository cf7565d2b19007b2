"""BERT checkpoints as transformers writes them, and BERT-CNN's own directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_fast.checkpoint.files import naming_config, read_json, read_weights, write_json, write_tensors
from blip_fast.checkpoint.names import Layout, native_layout, original_layout
from blip_fast.model.bert_cnn import PAIR_TOKENS, Bert, BertCnn
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig
from blip_fast.model.tokenizer import BLIP_TOKENS, Tokenizer

MODEL_TYPE = "blip_fast_bert_cnn"
# Fields in which BERTs differ, and the only value of each that is computed here.
NEEDED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
          "type_vocab_size": 2}


def load_bert(directory: str | Path) -> tuple[Bert, Tokenizer]:
    """Load an ordinary BERT: a directory with `config.json`, weights and `vocab.txt` or `tokenizer.json`.
    Heads and the pooler are left out. Its tokenizer gets [DEC] and [ENC], for which the embeddings get rows
    of zeros.

    Raises:
        FileNotFoundError: there is no such directory, or no tokenizer in it.
        ValueError: it is no BERT, or a cased one; it is broken (each tensor is named), or its tokenizer does
            not belong to it.
    """
    content = _config_of(directory)
    strange = next((key for key, value in NEEDED.items() if content.get(key, value) != value), None)
    if strange is not None or "model_type" not in content:
        key = strange or "model_type"
        raise ValueError(f"{directory} is no BERT that can be read here: {key} of its config.json is "
                         f"{content.get(key)!r}, not {NEEDED[key]!r}")
    with naming_config(Path(directory) / "config.json", "BERT"):
        config = TextConfig(
            vocab_size=content["vocab_size"], width=content["hidden_size"],
            layers=content["num_hidden_layers"],
            heads=content["num_attention_heads"], mlp_width=content["intermediate_size"],
            max_positions=content["max_position_embeddings"], norm_eps=content.get("layer_norm_eps", 1e-12),
            dropout=content.get("hidden_dropout_prob", 0.1), cross_attention=False)
    if config.max_positions < PAIR_TOKENS:
        raise ValueError(f"{directory}: this BERT has {config.max_positions} positions, and pairs have up to "
                         f"{PAIR_TOKENS} tokens")
    tokenizer = Tokenizer.from_pretrained(directory)
    added = max(0, tokenizer.vocab_size - config.vocab_size)
    if added > len(BLIP_TOKENS):
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, [DEC] and [ENC] "
                         f"counted, the model embeddings for {config.vocab_size}: they do not belong "
                         "together")
    with torch.device("meta"):
        bert = Bert(config)
    parameters = _layout(config).join(_own_tensors(read_weights(directory)), _shapes(bert), str(directory))
    parameters["word_embeds.weight"] = F.pad(parameters["word_embeds.weight"], (0, 0, 0, added))
    with torch.device("meta"):
        bert = Bert(dataclasses.replace(config, vocab_size=config.vocab_size + added))
    _fill(bert, parameters)
    return bert, tokenizer


def save_bert_cnn(model: BertCnn, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write a directory that `load_bert_cnn` reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                  directory / "model.safetensors")
    tokenizer.save(directory)
    write_json({"model_type": MODEL_TYPE, "bert": dataclasses.asdict(model.bert.config)},
               directory / "config.json")


def load_bert_cnn(directory: str | Path) -> tuple[BertCnn, Tokenizer]:
    """Load what `save_bert_cnn` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such directory, or no tokenizer in it.
        ValueError: it is no BERT-CNN, or a broken one (each tensor is named).
    """
    content = _config_of(directory)
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{directory}: config.json is of a {content.get('model_type')!r} model, not of a "
                         "BERT-CNN: name what `blip-fast train-reranker` wrote")
    with naming_config(Path(directory) / "config.json", "BERT"), torch.device("meta"):
        model = BertCnn(Bert(TextConfig(**content["bert"])))
    shapes = _shapes(model)
    _fill(model, native_layout(shapes).join(read_weights(directory), shapes, str(directory)))
    return model.eval(), Tokenizer.from_pretrained(directory)


def _config_of(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no directory with a config.json: name a checkpoint on this "
                                "machine")
    return read_json(path)


def _layout(config: TextConfig) -> Layout:
    """BERT's tensors are those of the published BLIP's text encoder without cross-attention, and the type
    embeddings."""
    encoder = BlipConfig(text=config, tokens=SpecialTokens(0, 0, 0, 0, 0), text_stacks="encoder",
                         contrastive=False, matching=False)
    parts = {ours.removeprefix("text.encoder."): tuple(part.removeprefix("text_encoder.") for part in parts)
             for ours, parts in original_layout(encoder).parts.items() if ours.startswith("text.encoder.")}
    parts["type_embeds.weight"] = ("embeddings.token_type_embeddings.weight",)
    return Layout(parts, {}, {"embeddings.position_ids": config.max_positions}, {})


def _own_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's own tensors: without heads, without the prefix of models that have heads, and with today's names
    of norms."""
    plain = {key.removeprefix("bert."): tensor for key, tensor in stored.items()}
    own = {key: tensor for key, tensor in plain.items() if key.startswith(("embeddings.", "encoder."))}
    today = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]
    for old, new in today:
        own = {key.replace(old, new): tensor for key, tensor in own.items()}
    return own


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _fill(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Give a model on the meta device its parameters, in float32."""
    model.load_state_dict({name: tensor.float() for name, tensor in parameters.items()}, assign=True)
