"""Reading a checkpoint of any form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from blip_fast.checkpoint import hugging_face, native, original
from blip_fast.checkpoint.files import find, read_json, read_tensors
from blip_fast.checkpoint.names import Stored, original_layout
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.model.vision import resize_positions


def load_model(source: str | Path, *, tokenizer: Tokenizer | None = None, image_size: int | None = None,
               heads: int | None = None,
               dtype: torch.dtype | None = torch.float32) -> tuple[BlipModel, Tokenizer | None]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        source: a directory or Hub model (`Salesforce/blip-image-captioning-base`) in the layout of
            transformers or in our own, or a published `.pth`.
        tokenizer: instead of the checkpoint's own.
        image_size: resize the position embeddings for images of this size.
        heads: attention heads of a `.pth`, the same for image and text. Needed if heads are not 64 wide and
            no JSON next to it says how many there are.
        dtype: of the parameters; None keeps the file's.

    Returns:
        The model, and the tokenizer, or None if the checkpoint brings none.

    Raises:
        FileNotFoundError: there is no such file, directory or Hub model.
        ValueError: it is no BLIP checkpoint or a broken one, a tensor is missing, not known or misshapen
            (each is named), or the tokenizer does not belong to it.
    """
    stored, tokenizer = _read(source, tokenizer, heads)
    model = _on_meta(stored.config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parameters = stored.layout.join(stored.tensors, shapes, str(source))
    if image_size not in (None, stored.config.vision.image_size):
        model = _on_meta(replace(stored.config, vision=replace(stored.config.vision, image_size=image_size)))
        positions = resize_positions(parameters["vision.position_embeds"], model.config.vision.tokens)
        parameters["vision.position_embeds"] = positions
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in parameters.items()}, assign=True)
    return model.eval(), tokenizer


def load_training_state(source: str | Path, config: BlipConfig) -> dict[str, Tensor]:
    """Queues and momentum copies of a checkpoint, under their published names; empty where it holds none.

    Args:
        source: as for `load_model`.
        config: of the loaded model: momentum copies must fit it, their positions are resized to its image
            size.

    Raises:
        ValueError: a momentum copy is of no tensor of the model, or misshapen.
    """
    state = _read_training_state(source)
    layout = original_layout(config)
    shapes = layout.part_shapes({name: tensor.shape
                                 for name, tensor in _on_meta(config).state_dict().items()})
    for key, tensor in state.items():
        if key in original.QUEUES:
            continue
        follows = key.replace("_m.", ".", 1)
        if follows == "visual_encoder.pos_embed":
            state[key] = tensor = resize_positions(tensor[0], config.vision.tokens)[None]
        if follows not in shapes and follows not in layout.position_ids:
            raise ValueError(f"{source}: the momentum tensor {key} is a copy of no tensor of the model")
        if follows in shapes and tensor.shape != shapes[follows]:
            raise ValueError(f"{source}: the momentum tensor {key} has shape {list(tensor.shape)} instead of "
                             f"{list(shapes[follows])}")
    return state


def _read(source: str | Path, tokenizer: Tokenizer | None,
          heads: int | None) -> tuple[Stored, Tokenizer | None]:
    path = Path(source)
    if path.is_file():
        tokenizer = tokenizer or _tokenizer(original.tokenizer_directory(path))
        stored = original.read(path, heads, _special_tokens(tokenizer))
    else:
        if (config_path := find(source, "config.json")) is None:
            raise ValueError(f"{source} is no checkpoint: it holds no config.json")
        if heads is not None:
            raise ValueError(f"heads is for a published .pth: {source} has a config.json that says how many "
                             "there are")
        content, tokenizer = read_json(config_path), tokenizer or _tokenizer(source)
        kind = content.get("model_type")
        if kind == native.MODEL_TYPE:
            stored = native.read(source, content)
        elif kind == "blip":
            stored = hugging_face.read(source, content, _special_tokens(tokenizer))
        else:
            raise ValueError(f"{source}: config.json is of a {kind!r} model, not of a BLIP model")
    if tokenizer is not None and tokenizer.vocab_size > stored.config.text.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeddings "
                         f"for {stored.config.text.vocab_size}: they do not belong together")
    return stored, tokenizer


def _tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a directory or Hub model; None where it has none."""
    if isinstance(source, Path) and not source.is_dir():
        return None
    has = any(find(source, name) is not None for name in ("tokenizer.json", "vocab.txt"))
    return Tokenizer.from_pretrained(source) if has else None


def _special_tokens(tokenizer: Tokenizer | None) -> SpecialTokens:
    """Special tokens for a checkpoint that does not name them: its tokenizer's, or bert-base-uncased's."""
    if tokenizer is None:
        return SpecialTokens()
    return SpecialTokens(pad=tokenizer.pad_id, cls=tokenizer.cls_id, sep=tokenizer.sep_id,
                         bos=tokenizer.bos_id, enc=tokenizer.enc_id)


def _read_training_state(source: str | Path) -> dict[str, Tensor]:
    if Path(source).is_file():
        return {key: value for key, value in original.read_all(Path(source)).items()
                if original.is_training_state(key)}
    path = find(source, native.TRAINING_FILE)
    return {} if path is None else read_tensors(path)


def _on_meta(config: BlipConfig) -> BlipModel:
    """The model on the meta device. Every parameter is assigned afterwards, so none is initialised in vain or
    left out."""
    with torch.device("meta"):
        return BlipModel(config)
