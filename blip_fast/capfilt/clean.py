"""Captioning and filtering of web images, batch by batch.

Of each image the filter projects the keys and values once; its web captions and its synthetic one are one packed
segment that reads them together.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from blip_fast.generate import GenerationConfig, generate
from blip_fast.inference import evaluating, image_batches
from blip_fast.model import BlipModel
from blip_fast.tokenizer import Tokenizer, clean_caption

MAX_MATCHING_TOKENS = 35  # as published for ITM
NUCLEUS = GenerationConfig(top_p=0.9, max_length=20, min_length=5)  # beam search was found worse (BLIP table 2)


@dataclass(frozen=True)
class CapFiltConfig:
    """How texts are written and kept. Defaults as published.

    `generation.seed` and an image's name are the seed of its synthetic caption, so the caption depends on neither the
    order nor the batches. A text is kept where ITM's probability of 'matched' is `threshold` or more.
    """

    prompt: str = "a picture of"
    generation: GenerationConfig = NUCLEUS
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it is a probability, 0 to 1")


@dataclass(frozen=True, eq=False)
class WebBatch:
    """Web images: names, pixels float [images, 3, size, size], and the captions of each (any number of them)."""

    names: Sequence[str]
    pixels: Tensor
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.pixels) == len(self.captions):
            raise ValueError(f"names, pixels and captions must be of the same images, got {len(self.names)}, "
                             f"{len(self.pixels)} and {len(self.captions)}")


@dataclass(frozen=True)
class CapFiltRow:
    """One text of one image, with ITM's probability that they match."""

    image: str
    text: str
    origin: Literal["web", "synthetic"]
    itm: float
    kept: bool


@dataclass(frozen=True)
class CapFiltResult:
    """All texts, image after image: its web captions, then its synthetic one."""

    rows: list[CapFiltRow]

    def of_origin(self, origin: Literal["web", "synthetic"]) -> list[CapFiltRow]:
        return [row for row in self.rows if row.origin == origin]

    def write_jsonl(self, path: str | Path) -> None:
        """One object a line: `image`, `text`, `origin`, `itm`, `kept`."""
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows)
        Path(path).write_text("".join(lines), encoding="utf-8")


def capfilt(captioner: BlipModel, matcher: BlipModel, tokenizer: Tokenizer, batches: Iterable[WebBatch],
            config: CapFiltConfig = CapFiltConfig()) -> CapFiltResult:
    """Run CapFilt over all batches. Arguments and errors as `capfilt_batch`."""
    return CapFiltResult([row for batch in batches
                          for row in capfilt_batch(captioner, matcher, tokenizer, batch, config)])


def capfilt_batch(captioner: BlipModel, matcher: BlipModel, tokenizer: Tokenizer, batch: WebBatch,
                  config: CapFiltConfig) -> list[CapFiltRow]:
    """Write one synthetic caption per image, score it and the image's web captions, and say which are kept.

    Args:
        captioner: a model with a text decoder, fine-tuned on clean captions.
        matcher: a model with a text encoder and the matching head, likewise. May be the captioner itself: then an
            image is encoded once for both.
        tokenizer: of both models.
        batch: the images; what exists of them at a time, so its size bounds the memory.

    Returns:
        The rows, image after image. A text without a word is never kept.

    Raises:
        ValueError: a model lacks its part, or the two take images of different sizes.
    """
    if captioner.config.vision.image_size != matcher.config.vision.image_size:
        raise ValueError(f"the captioner takes images of {captioner.config.vision.image_size} px, the filter of "
                         f"{matcher.config.vision.image_size}: load both with one image_size")
    rows = []
    with evaluating(captioner), evaluating(matcher):
        first = 0
        for pixels in image_batches(captioner, batch.pixels):
            these = slice(first, first := first + len(pixels))
            names, web = batch.names[these], batch.captions[these]
            embeds = captioner.encode_images(pixels)
            synthetic = _synthetic(captioner, tokenizer, embeds, names, config)
            if matcher is not captioner:
                embeds = torch.cat([matcher.encode_images(p) for p in image_batches(matcher, pixels)])
            texts = [[*mine, new] for mine, new in zip(web, synthetic, strict=True)]
            scores = iter(_match_probabilities(matcher, tokenizer, embeds, texts))
            for name, mine in zip(names, texts, strict=True):
                rows += [_row(name, text, i == len(mine) - 1, next(scores), config) for i, text in enumerate(mine)]
    return rows


def _row(name: str, text: str, synthetic: bool, itm: float, config: CapFiltConfig) -> CapFiltRow:
    has_word = any(char.isalnum() for char in text)
    return CapFiltRow(name, text, "synthetic" if synthetic else "web", itm, has_word and itm >= config.threshold)


def _synthetic(captioner: BlipModel, tokenizer: Tokenizer, image_embeds: Tensor, names: Sequence[str],
               config: CapFiltConfig) -> list[str]:
    """One caption per image, without the prompt."""
    prompt = tokenizer.encode(config.prompt, first="[DEC]")[:-1]
    prompts = torch.tensor(prompt, device=image_embeds.device).repeat(len(names), 1)
    seeds = [zlib.crc32(f"{config.generation.seed} {name}".encode()) for name in names]
    image_kv = captioner.stack("decoder").image_kv(image_embeds)
    written = generate(captioner, image_kv, prompts, config.generation, seeds)
    return [tokenizer.decode(text.token_ids[len(prompt):]) for text in written]


def _match_probabilities(matcher: BlipModel, tokenizer: Tokenizer, image_embeds: Tensor,
                         texts: Sequence[Sequence[str]]) -> list[float]:
    """ITM's probability of 'matched' for the texts of each image, in order."""
    device = image_embeds.device
    cleaned = [clean_caption(text) for mine in texts for text in mine]
    packed = tokenizer.pack(cleaned, first="[ENC]", max_tokens=MAX_MATCHING_TOKENS).to(device)
    counts = torch.tensor([len(mine) for mine in texts], device=device)
    images = torch.arange(len(texts), device=device).repeat_interleave(counts)
    logits = matcher.match_logits(packed, images, matcher.stack("encoder").image_kv(image_embeds))
    return logits.softmax(-1)[:, 1].tolist()
