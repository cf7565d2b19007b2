"""Sizes of a BLIP model. Frozen, validated, JSON in and out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

TextStacks = Literal["tied", "untied", "encoder", "decoder"]


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer (BLIP section 3.1; ViT-B/16 unless changed)."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # stochastic depth of the last block, rising linearly from 0 in the first

    def __post_init__(self) -> None:
        _divides("vision.width", self.width, "vision.heads", self.heads)
        _divides("vision.image_size", self.image_size, "vision.patch_size", self.patch_size)
        _fraction("vision.drop_path", self.drop_path)

    @property
    def tokens(self) -> int:
        """Visual tokens of one image: its patches and [CLS]."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """The text stack (BERT-base shape unless changed)."""

    vocab_size: int = 30524
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    norm_eps: float = 1e-12
    dropout: float = 0.1  # hidden states and attention weights, in training
    cross_attention: bool = True
    twin_cross_attention: bool = False  # NLVR2: each layer looks at two images

    def __post_init__(self) -> None:
        _divides("text.width", self.width, "text.heads", self.heads)
        _fraction("text.dropout", self.dropout)


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own (bert-base-uncased with [DEC] and [ENC] unless changed)."""

    pad: int = 0
    cls: int = 101
    sep: int = 102
    bos: int = 30522  # [DEC]
    enc: int = 30523  # [ENC]


@dataclass(frozen=True)
class BlipConfig:
    """One BLIP model: which parts it has and how large they are.

    `text_stacks` says which text modes there are: `tied` (pre-training: encoder and decoder share all but
    self-attention), `untied` (VQA), or only an `encoder` (matching, NLVR2) or `decoder` (captioning). A
    decoder's LM head projects with the word embeddings, or with a weight of its own if not `tied_lm_head`
    (docs/decisions/model.md).
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    text_stacks: TextStacks = "tied"
    contrastive: bool = True  # image and text projections and the temperature (ITC)
    matching: bool = True  # the two-way ITM head
    reasoning: bool = False  # NLVR2's two-layer head
    embed_dim: int = 256
    tied_lm_head: bool = True

    def __post_init__(self) -> None:
        if self.text_stacks not in ("tied", "untied", "encoder", "decoder"):
            raise ValueError("text_stacks must be tied, untied, encoder or decoder, got "
                             f"{self.text_stacks!r}")
        if self.text_stacks == "decoder" and (self.contrastive or self.matching or self.reasoning):
            raise ValueError("a model with only a decoder cannot have contrastive, matching or reasoning "
                             "heads: they read the text encoder; switch them off or choose other text_stacks")
        highest = max(dataclasses.astuple(self.tokens))
        if highest >= self.text.vocab_size:
            raise ValueError(f"text.vocab_size {self.text.vocab_size} does not hold the special token id "
                             f"{highest}")

    @property
    def has_encoder(self) -> bool:
        return self.text_stacks != "decoder"

    @property
    def has_decoder(self) -> bool:
        return self.text_stacks != "encoder"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlipConfig:
        """The inverse of `to_dict`. Raises ValueError naming a key that is not known."""
        parts = {"vision": VisionConfig, "text": TextConfig, "tokens": SpecialTokens}
        return _build(cls, {key: _build(parts[key], value, key) if key in parts else value
                            for key, value in values.items()})


def _build(kind: type, values: dict[str, Any], where: str = "config") -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}: known keys are "
                         f"{', '.join(sorted(known))}")
    return kind(**values)


def _divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor < 1 or value < 1 or value % divisor:
        raise ValueError(f"{divisor_name} ({divisor}) must divide {name} ({value})")


def _fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


VISION_SIZES = {
    "base": VisionConfig(),
    "large": VisionConfig(width=1024, layers=24, heads=16, drop_path=0.1),
}


# What one task needs of a model, as fields of `BlipConfig`.
TASK_PARTS: dict[str, dict[str, Any]] = {
    "caption": {"text_stacks": "decoder", "contrastive": False, "matching": False, "reasoning": False},
    "match": {"text_stacks": "encoder", "contrastive": True, "matching": True, "reasoning": False},
    "answer": {"text_stacks": "untied", "contrastive": False, "matching": False, "reasoning": False},
}
