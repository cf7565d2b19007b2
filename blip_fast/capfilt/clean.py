"""Captioning and filtering of web images, as a stream or as batches in memory.

The filter projects each image's keys and values once. The image's web and synthetic captions, packed
together, all read them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from blip_fast.generate import GenerationConfig
from blip_fast.media.images import ImageError, unless_error
from blip_fast.model.tokenizer import clean_caption
from blip_fast.tasks.captioner import BATCH, PROMPT, Caption, Captioner
from blip_fast.tasks.matcher import MAX_TOKENS, Matcher, MatchScores, image_of_each

# Beam search was found worse (BLIP table 2).
NUCLEUS = GenerationConfig(top_p=0.9, max_length=20, min_length=5)

Keep = Literal["matched", "best"]
Origin = Literal["web", "synthetic"]


@dataclass(frozen=True)
class CapFiltConfig:
    """How texts are written and kept. The defaults are the published ones.

    An image's synthetic captions (`generation.n_best` of them) are seeded by `generation.seed` and the
    image's pixels, so they depend on neither order nor batches. The filter sees each text after
    `first_token`. With `keep` = `matched`, all texts are kept whose ITM probability of 'matched' is at least
    `threshold` (0.5 is the matching head's arg-max); with `best`, only the best of these for each image, the
    first of equal ones.
    """

    prompt: str = PROMPT
    generation: GenerationConfig = NUCLEUS
    threshold: float = 0.5
    first_token: str = "[ENC]"
    keep: Keep = "matched"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it is a probability, 0 to 1")
        if self.keep not in ("matched", "best"):
            raise ValueError(f"keep is {self.keep!r}: it must be matched or best")


@dataclass(frozen=True, eq=False)
class WebImage:
    """A web image: its name, pixels float [3, size, size] after the evaluation transform, and any number of
    captions."""

    name: str
    pixels: Tensor
    captions: Sequence[str]


@dataclass(frozen=True, eq=False)
class WebBatch:
    """Web images: names, pixels float [images, 3, size, size], and any number of captions for each."""

    names: Sequence[str]
    pixels: Tensor
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.pixels) == len(self.captions):
            raise ValueError(f"names, pixels and captions must be of the same images, got {len(self.names)}, "
                             f"{len(self.pixels)} and {len(self.captions)}")


@dataclass(frozen=True)
class CapFiltRow:
    """One text of one image: ITM's probability that they match, ITC's cosine, whether the text is kept, and
    whether it was `cut`, that is, a synthetic text truncated by `generation.max_length`."""

    image: str
    text: str
    origin: Origin
    itm: float
    itc: float
    kept: bool
    cut: bool


@dataclass(frozen=True)
class CapFiltResult:
    """All texts, image by image: first its web captions, then its synthetic ones, likeliest first."""

    rows: list[CapFiltRow]

    def of_origin(self, origin: Origin) -> list[CapFiltRow]:
        return [row for row in self.rows if row.origin == origin]

    def write_jsonl(self, path: str | Path) -> None:
        """Write one object per line: `image`, `text`, `origin`, `itm`, `itc`, `kept`, `cut`."""
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows)
        Path(path).write_text("".join(lines), encoding="utf-8")


Image = TypeVar("Image", bound=WebImage)


def capfilt(captioner: Captioner, matcher: Matcher, batches: Iterable[WebBatch],
            config: CapFiltConfig = CapFiltConfig()) -> CapFiltResult:
    """Run CapFilt over all batches. Arguments and errors are those of `capfilt_batch`."""
    return CapFiltResult([row for batch in batches
                          for row in capfilt_batch(captioner, matcher, batch, config)])


def capfilt_batch(captioner: Captioner, matcher: Matcher, batch: WebBatch,
                  config: CapFiltConfig) -> list[CapFiltRow]:
    """`capfilt_stream` over one batch, all of whose images are captioned together.

    Returns:
        The rows, image by image.

    Raises:
        ImageError: for the first image that got no caption.
        ValueError: as in `capfilt_stream`.
    """
    images = map(WebImage, batch.names, batch.pixels, batch.captions)
    rows: list[CapFiltRow] = []
    for _, found in capfilt_stream(captioner, matcher, images, config, batch_size=max(1, len(batch.names))):
        rows += unless_error(found)
    return rows


def capfilt_stream(captioner: Captioner, matcher: Matcher, images: Iterable[Image], config: CapFiltConfig, *,
                   batch_size: int = BATCH) -> Iterator[tuple[Image, list[CapFiltRow] | ImageError]]:
    """Write synthetic captions for each image, score them and the image's web captions, and decide which are
    kept.

    Args:
        captioner: fine-tuned on clean captions, like the filter.
        matcher: the filter. A text of more than 30 words is scored by its first 30, as in pre-training.
        images: any number; a few times `batch_size` of them are in memory at a time.
        batch_size: images that are captioned, and scored, together.

    Returns:
        In order, each image with its rows, or with an error if no caption has a probability. A text without a
        word is never kept.

    Raises:
        ValueError: as in `check_models`, at once.
    """
    check_models(captioner, matcher, config)
    waiting: deque[Image] = deque()  # images whose captions are being written

    def pixels() -> Iterator[Tensor]:
        for image in images:
            waiting.append(image)
            yield image.pixels

    written = captioner.stream_pixels(pixels(), config.prompt, config.generation, strip_prompt=True,
                                      batch_size=batch_size)
    return _filter(matcher, ((waiting.popleft(), result) for result in written), config, batch_size)


def check_models(captioner: Captioner, matcher: Matcher, config: CapFiltConfig) -> None:
    """Raise ValueError if the captioner and the filter take images of different sizes, or if the prompt or
    the first token does not fit."""
    size, filter_size = (task.model.config.vision.image_size for task in (captioner, matcher))
    if size != filter_size:
        raise ValueError(f"the captioner takes images of {size} px, the filter of {filter_size}: "
                         "load both with one image_size")
    captioner.stream_pixels([], config.prompt, config.generation)
    matcher.pack([], config.first_token)


def _filter(matcher: Matcher, written: Iterator[tuple[Image, Caption | ImageError]], config: CapFiltConfig,
            batch_size: int) -> Iterator[tuple[Image, list[CapFiltRow] | ImageError]]:
    """Score the texts of captioned images and decide which are kept, `batch_size` images at a time."""
    while some := list(islice(written, batch_size)):
        captioned = [(image, _texts(image, caption)) for image, caption in some
                     if isinstance(caption, Caption)]
        scores = iter(_score(matcher, [image.pixels for image, _ in captioned],
                             [[each.text for each in texts] for _, texts in captioned], config.first_token))
        left = iter(texts for _, texts in captioned)
        for image, caption in some:
            yield image, (caption if isinstance(caption, ImageError)
                          else _rows(image, next(left), scores, config))


@dataclass(frozen=True)
class _Text:
    """A text to be scored; see `CapFiltRow`."""

    text: str
    origin: Origin
    cut: bool


def _texts(image: WebImage, caption: Caption) -> list[_Text]:
    """The image's web captions, then the synthetic ones, likeliest first."""
    return [*(_Text(text, "web", cut=False) for text in image.captions),
            *(_Text(each.caption, "synthetic", each.cut) for each in (caption, *caption.others))]


def _score(matcher: Matcher, pixels: Sequence[Tensor], texts: Sequence[Sequence[str]],
           first_token: str) -> Iterable[tuple[float, float]]:
    """(ITM, ITC) of each text, image by image."""
    if not pixels:
        return ()
    scores = match_scores(matcher, torch.stack(list(pixels)), texts, first_token)
    return zip(scores.itm.tolist(), scores.itc.tolist(), strict=True)


def _rows(image: WebImage, texts: Sequence[_Text], scores: Iterator[tuple[float, float]],
          config: CapFiltConfig) -> list[CapFiltRow]:
    """The image's rows. Takes one pair (ITM, ITC) per text from `scores`."""
    mine = list(islice(scores, len(texts)))
    passed = [itm >= config.threshold and any(char.isalnum() for char in each.text)
              for each, (itm, _) in zip(texts, mine, strict=True)]
    if config.keep == "best" and any(passed):
        best = max((i for i, ok in enumerate(passed) if ok), key=lambda i: mine[i][0])
        passed = [i == best for i in range(len(texts))]
    return [CapFiltRow(image.name, each.text, each.origin, itm, itc, kept, each.cut)
            for each, (itm, itc), kept in zip(texts, mine, passed, strict=True)]


def match_scores(matcher: Matcher, pixels: Tensor, texts: Sequence[Sequence[str]],
                 first_token: str) -> MatchScores:
    """The filter's scores [texts] of the texts of each image, image by image. Texts are cleaned as in
    pre-training.

    Args:
        pixels: float [images, 3, size, size] after the evaluation transform.
    """
    packed = matcher.tokenizer.pack([clean_caption(text) for mine in texts for text in mine], first_token,
                                    MAX_TOKENS)
    return matcher.score_pairs(pixels, packed, image_of_each(texts))
