"""What the published checkpoints and transformers call our parameters, and how they cut them.

We fuse what is computed together: a layer's query, key and value, and all layers' keys and values of an
image. A file holds the parts, so each of our parameters is the rows of one or more of its tensors, one after
the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip_fast.model.config import BlipConfig
from blip_fast.model.text import CrossAttention

LM_HEAD = "text_decoder.cls.predictions"
DECODER_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
PUBLISHED_AXES = {"vision.cls_token": 2, "vision.position_embeds": 1, "temperature": -1}


@dataclass(frozen=True)
class Layout:
    """The tensors of one file form for one config.

    `parts`: our parameter → the file's tensors whose rows it holds. `copies`: a tensor that the file may
    store a second time → its source. `position_ids`: buffers that only count 0, 1, … up to the number of
    positions. `axes`: how many leading axes of length 1 a tensor has more than ours.
    """

    parts: dict[str, tuple[str, ...]]
    copies: dict[str, str]
    position_ids: dict[str, int]
    axes: dict[str, int]

    def join(self, stored: Mapping[str, Tensor], shapes: Mapping[str, torch.Size],
             source: str) -> dict[str, Tensor]:
        """The file's tensors → our parameters, in memory of their own.

        Args:
            stored: every tensor of the file, training state excepted.
            shapes: of our parameters.
            source: the file, for messages.

        Raises:
            ValueError: a key is missing, not known or misshapen, or a copy differs from its source; all are
                named.
        """
        stored = self._without_copies(dict(stored), source)
        wanted = self.part_shapes(shapes)
        faults = {
            "missing": [key for key in wanted if key not in stored],
            "unexpected": [key for key in stored if key not in wanted],
            "misshapen": [f"{key} {list(stored[key].shape)} instead of {list(shape)}"
                          for key, shape in wanted.items()
                          if key in stored and stored[key].shape != shape],
        }
        if any(faults.values()):
            named = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
            raise ValueError(f"{source} does not fit the BLIP model that its sizes and parts describe: "
                             f"{named}")
        return {name: torch.cat([stored[part].flatten() for part in parts]).view(shapes[name])
                for name, parts in self.parts.items()}

    def split(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters (or what is shaped like them: their gradients) → the file's tensors, copies left
        out."""
        stored: dict[str, Tensor] = {}
        for name, parts in self.parts.items():
            tensor = parameters[name].detach()
            tensor = tensor.view(self._whole_shape(name, tensor.shape))
            rows = tensor.chunk(len(parts)) if len(parts) > 1 else [tensor]
            stored.update({part: piece.clone() for part, piece in zip(parts, rows, strict=True)})
        return stored

    def stored_twice(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies and position ids that belong to `stored`; copies share its memory."""
        copies = {copy: stored[source] for copy, source in self.copies.items()}
        return copies | {key: torch.arange(length)[None] for key, length in self.position_ids.items()}

    def part_shapes(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Shapes of our parameters → shapes of the file's tensors."""
        wanted: dict[str, torch.Size] = {}
        for name, parts in self.parts.items():
            shape = self._whole_shape(name, shapes[name])
            if len(parts) > 1:
                shape = (shape[0] // len(parts), *shape[1:])
            wanted.update(dict.fromkeys(parts, torch.Size(shape)))
        return wanted

    def _whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The file's shape of our parameter before it is cut into parts."""
        axes = self.axes.get(name, 0)
        return torch.Size((*[1] * axes, *shape[max(0, -axes):]))

    def _without_copies(self, stored: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        for copy, original in self.copies.items():
            tensor = stored.pop(copy, None)
            if tensor is not None and not torch.equal(tensor, stored.setdefault(original, tensor)):
                raise ValueError(f"{source}: {copy} differs from {original}, but BLIP ties the two")
        for key, length in self.position_ids.items():
            tensor = stored.pop(key, None)
            if tensor is not None and not torch.equal(tensor.flatten(), torch.arange(length)):
                raise ValueError(f"{source}: {key} must count from 0 to {length - 1}")
        return stored


@dataclass(frozen=True)
class Stored:
    """A checkpoint as read: what model it is, and its tensors as the form names them."""

    config: BlipConfig
    layout: Layout
    tensors: dict[str, Tensor]


def native_layout(names: Mapping[str, object]) -> Layout:
    """Our own form: every parameter under its own name."""
    return Layout({name: (name,) for name in names}, {}, {}, {})


def original_layout(config: BlipConfig) -> Layout:
    """The published `.pth` form."""
    parts = dict(_vision(config))
    copies: dict[str, str] = {}
    prefixes = {"encoder": "text_encoder", "decoder": "text_decoder.bert"}
    if config.text_stacks == "tied":
        own = dict(_text_stack("text.tied", prefixes["encoder"], config, ("encoder", "decoder")))
        parts.update(own)
        shared = [part for parts_ in own.values() for part in parts_ if ".attention." not in part]
        copies.update({part.replace(prefixes["encoder"], prefixes["decoder"], 1): part for part in shared})
    else:
        for mode in ("encoder", "decoder"):
            if config.text_stacks in (mode, "untied"):
                parts.update(_text_stack(f"text.{mode}", prefixes[mode], config, (mode,)))
    if config.has_decoder:
        parts.update(_module("lm_head.dense", f"{LM_HEAD}.transform.dense"))
        parts.update(_module("lm_head.norm", f"{LM_HEAD}.transform.LayerNorm"))
        parts["lm_head.bias"] = (f"{LM_HEAD}.bias",)
        if config.tied_lm_head:
            copies[f"{LM_HEAD}.decoder.weight"] = copies.get(DECODER_WORDS, DECODER_WORDS)
        else:
            parts["lm_head.projection.weight"] = (f"{LM_HEAD}.decoder.weight",)
        copies[f"{LM_HEAD}.decoder.bias"] = f"{LM_HEAD}.bias"
    parts.update(_heads(config))
    modes = [mode for mode, has in (("encoder", config.has_encoder), ("decoder", config.has_decoder)) if has]
    position_ids = {f"{prefixes[mode]}.embeddings.position_ids": config.text.max_positions for mode in modes}
    return Layout(parts, copies, position_ids, PUBLISHED_AXES)


def has_tied_lm_head(stored: Mapping[str, Tensor]) -> bool:
    """Whether a file's LM head projects with the decoder's word embeddings: only its tensors say so, in both
    forms."""
    projection, words = stored.get(f"{LM_HEAD}.decoder.weight"), stored.get(DECODER_WORDS)
    return projection is None or words is None or torch.equal(projection, words)


def hugging_face_layout(config: BlipConfig) -> Layout:
    """The form of transformers: the published one, except for names in the vision transformer."""
    layout = original_layout(config)
    parts = {name: tuple(map(_hugging_face_name, parts)) for name, parts in layout.parts.items()}
    return replace(layout, parts=parts)


def _vision(config: BlipConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "vision.cls_token", ("visual_encoder.cls_token",)
    yield "vision.position_embeds", ("visual_encoder.pos_embed",)
    yield from _module("vision.patch_embed", "visual_encoder.patch_embed.proj")
    modules = {"norm1": "norm1", "qkv": "attn.qkv", "attention_out": "attn.proj", "norm2": "norm2",
               "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
    for i in range(config.vision.layers):
        for ours, published in modules.items():
            yield from _module(f"vision.blocks.{i}.{ours}", f"visual_encoder.blocks.{i}.{published}")
    yield from _module("vision.norm", "visual_encoder.norm")


def _text_stack(ours: str, published: str, config: BlipConfig,
                modes: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{ours}.word_embeds.weight", (f"{published}.embeddings.word_embeddings.weight",)
    yield f"{ours}.position_embeds.weight", (f"{published}.embeddings.position_embeddings.weight",)
    yield from _module(f"{ours}.norm", f"{published}.embeddings.LayerNorm")
    layers = [f"{published}.encoder.layer.{i}" for i in range(config.text.layers)]
    for i, layer in enumerate(layers):
        for mode in modes:
            # A tied stack holds the decoder's self-attention next to the encoder's.
            decoders = len(modes) > 1 and mode == "decoder"
            own = layer.replace("text_encoder", "text_decoder.bert") if decoders else layer
            attention, self_attention = f"{ours}.layers.{i}.self_attention.{mode}", f"{own}.attention"
            yield from _module(f"{attention}.qkv",
                               *(f"{self_attention}.self.{x}" for x in ("query", "key", "value")))
            yield from _module(f"{attention}.out", f"{self_attention}.output.dense")
            yield from _module(f"{attention}.norm", f"{self_attention}.output.LayerNorm")
        if config.text.cross_attention:
            yield from _cross_attention(f"{ours}.layers.{i}.cross_attention", f"{layer}.crossattention",
                                        config, i)
        feed_forward = f"{ours}.layers.{i}.feed_forward"
        yield from _module(f"{feed_forward}.mlp_in", f"{layer}.intermediate.dense")
        yield from _module(f"{feed_forward}.mlp_out", f"{layer}.output.dense")
        yield from _module(f"{feed_forward}.norm", f"{layer}.output.LayerNorm")
    for eye, suffix in enumerate(_eyes(config)):
        kv = [f"{layer}.crossattention.self{suffix}.{x}" for layer in layers for x in ("key", "value")]
        yield from _module(f"{ours}.image_to_kv.{eye}", *kv)


def _cross_attention(ours: str, published: str, config: BlipConfig,
                     layer: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    eyes = _eyes(config)
    for eye, suffix in enumerate(eyes):
        yield from _module(f"{ours}.query.{eye}", f"{published}.self{suffix}.query")
        yield from _module(f"{ours}.out.{eye}", f"{published}.output.dense{suffix}")
    if len(eyes) == 2 and layer >= CrossAttention.FIRST_MERGING_LAYER:
        yield from _module(f"{ours}.merge", f"{published}.output.merge_layer")
    yield from _module(f"{ours}.norm", f"{published}.output.LayerNorm")


def _eyes(config: BlipConfig) -> tuple[str, ...]:
    """Suffixes of NLVR2's two cross-attentions; other models have one, without a suffix."""
    if not config.text.cross_attention:
        return ()
    return ("0", "1") if config.text.twin_cross_attention else ("",)


def _heads(config: BlipConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if config.contrastive:
        yield from _module("vision_projection", "vision_proj")
        yield from _module("text_projection", "text_proj")
        yield "temperature", ("temp",)
    if config.matching:
        yield from _module("itm_head", "itm_head")
    if config.reasoning:
        yield from _module("reasoning_head.0", "cls_head.0")
        yield from _module("reasoning_head.2", "cls_head.2")


def _module(ours: str, *published: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in published)


def _hugging_face_name(published: str) -> str:
    if not published.startswith("visual_encoder."):
        return published
    name = published.removeprefix("visual_encoder.")
    if name.startswith("blocks."):
        name = name.replace("blocks.", "encoder.layers.", 1)
        name = name.replace(".attn.proj.", ".self_attn.projection.").replace(".attn.", ".self_attn.")
        return "vision_model." + name.replace(".norm", ".layer_norm")
    outer = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
             "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
             "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
             "norm.weight": "post_layernorm.weight", "norm.bias": "post_layernorm.bias"}
    return "vision_model." + outer[name]


def _some(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
