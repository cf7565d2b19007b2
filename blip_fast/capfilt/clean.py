"""Captioning and filtering of web images, batch by batch.

Of each image the filter projects the keys and values once; its web captions and its synthetic one, packed, read them
together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from blip_fast.generate import GenerationConfig
from blip_fast.inference import encode_images, evaluating
from blip_fast.tasks.caption import PROMPT, Captioner
from blip_fast.tasks.match import MAX_TOKENS, Matcher, image_of_each
from blip_fast.tokenizer import clean_caption

NUCLEUS = GenerationConfig(top_p=0.9, max_length=20, min_length=5)  # beam search was found worse (BLIP table 2)


@dataclass(frozen=True)
class CapFiltConfig:
    """How texts are written and kept. Defaults as published.

    `generation.seed` and an image's own pixels are the seed of its synthetic caption, so the caption depends on neither
    the order nor the batches. A text is kept where ITM's probability of 'matched' is `threshold` or more; the filter
    sees it behind `first_token`.
    """

    prompt: str = PROMPT
    generation: GenerationConfig = NUCLEUS
    threshold: float = 0.5
    first_token: str = "[ENC]"

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


def capfilt(captioner: Captioner, matcher: Matcher, batches: Iterable[WebBatch],
            config: CapFiltConfig = CapFiltConfig()) -> CapFiltResult:
    """Run CapFilt over all batches. Arguments and errors as `capfilt_batch`."""
    return CapFiltResult([row for batch in batches for row in capfilt_batch(captioner, matcher, batch, config)])


def capfilt_batch(captioner: Captioner, matcher: Matcher, batch: WebBatch, config: CapFiltConfig) -> list[CapFiltRow]:
    """Write one synthetic caption per image, score it and the image's web captions, and say which are kept.

    Args:
        captioner: fine-tuned on clean captions, as is the filter.
        matcher: the filter. A text of more than 30 words is scored by its first 30, as in pre-training.
        batch: the images that exist at a time, so its size bounds the memory.

    Returns:
        The rows, image after image. A text without a word is never kept.

    Raises:
        ValueError: the captioner and the filter take images of different sizes.
    """
    size, filter_size = (task.model.config.vision.image_size for task in (captioner, matcher))
    if size != filter_size:
        raise ValueError(f"the captioner takes images of {size} px, the filter of {filter_size}: load both with one "
                         "image_size")
    written = captioner.caption_pixels(batch.pixels, config.prompt, config.generation, strip_prompt=True)
    texts = [[*web, synthetic.caption] for web, synthetic in zip(batch.captions, written, strict=True)]
    scores = iter(match_probabilities(matcher, batch.pixels, texts, config.first_token))
    return [_row(name, text, i == len(mine) - 1, next(scores), config.threshold)
            for name, mine in zip(batch.names, texts, strict=True) for i, text in enumerate(mine)]


def _row(name: str, text: str, synthetic: bool, itm: float, threshold: float) -> CapFiltRow:
    has_word = any(char.isalnum() for char in text)
    return CapFiltRow(name, text, "synthetic" if synthetic else "web", itm, has_word and itm >= threshold)


def match_probabilities(matcher: Matcher, pixels: Tensor, texts: Sequence[Sequence[str]],
                         first_token: str) -> list[float]:
    """ITM's probability of 'matched' for the texts of each image, in order; one pass for all of them."""
    cleaned = [clean_caption(text) for mine in texts for text in mine]
    packed = matcher.tokenizer.pack(cleaned, first_token, MAX_TOKENS)
    images = image_of_each(texts)
    model = matcher.model
    with evaluating(model):
        for embeds in encode_images(model, [pixels]):  # one batch, or none where there is no image
            image_kv = model.stack("encoder").image_kv(embeds)
            logits = model.match_logits(packed.to(embeds.device), images.to(embeds.device), image_kv)
            return logits.softmax(-1)[:, 1].tolist()
    return []
