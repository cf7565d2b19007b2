"""Captions for images (BLIP section 5.2): for a few, or for a stream of any length."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import Tensor

from blip_fast.generate import Generated, GenerationConfig, Request, generate_stream
from blip_fast.images import ImageError, ImageSource, name_of, unless_error
from blip_fast.inference import PACKED_TOGETHER, encode_images, evaluated
from blip_fast.model import BlipModel
from blip_fast.stream import in_order, read_ahead
from blip_fast.tasks.loading import PretrainedTask, as_sources, pixels_or_error
from blip_fast.text import ImageKV
from blip_fast.tokenizer import Tokenizer

PROMPT = "a picture of"
CAPTIONING = GenerationConfig(beams=3, max_length=20, min_length=5)  # as published for COCO
BATCH = 16
MAX_REFUSED = 1000  # images that wait to be told as unreadable while the batch is being filled


@dataclass(frozen=True)
class Caption:
    """A caption.

    `caption` is the text of `token_ids` without special tokens, the prompt included unless it was stripped.
    `token_ids` is what transformers' `generate` returns for the image: [DEC], the prompt, the generated tokens and
    [SEP], which is missing where the caption is `cut`: `max_length` ended it before it had come to its end. `score`
    follows the beam rule of the `GenerationConfig`.
    `others` are the next best, best first, where `n_best` asks for them. Where they were re-ranked (`tasks/rerank.py`)
    `rerank` is what the order goes by.
    """

    caption: str
    token_ids: list[int]
    score: float
    cut: bool
    others: tuple[Caption, ...] = ()
    rerank: float | None = None


@dataclass(frozen=True)
class Captioned:
    """What became of one image: its place in the stream, from 0; the image as it was given; its path or name, or "image
    PLACE"; the prompt that it brought, if any."""

    place: int
    source: ImageSource
    image: str
    prompt: str | None
    result: Caption | ImageError


@dataclass(frozen=True)
class _Read:
    """One image with its prompt's tokens; pixels float32 [3, image_size, image_size], or why there is nothing to
    caption."""

    place: int
    source: ImageSource
    image: str
    prompt: str | None
    prompt_ids: list[int]
    pixels: Tensor | ImageError

    def with_result(self, result: Caption | ImageError) -> Captioned:
        return Captioned(self.place, self.source, self.image, self.prompt, result)


class Captioner(PretrainedTask):
    """Writes captions. `Captioner.from_pretrained("Salesforce/blip-image-captioning-base")(["photo.jpg"])`.

    A caption depends on its image, its prompt and the options alone, never on the other images, their order or
    `batch_size`. Sampling draws from a seed made of `generation.seed` and the image's own pixels, whatever its name or
    place, so two copies of an image are captioned alike.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model has no text decoder."""
        model.stack("decoder")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Iterable[ImageSource], prompt: str | Sequence[str] = PROMPT,
                 generation: GenerationConfig = CAPTIONING, *, banned: Sequence[str] = (), strip_prompt: bool = False,
                 batch_size: int = BATCH) -> list[Caption]:
        """Caption one image or many.

        Args:
            images: paths, `file://` URLs, encoded bytes, Pillow images, uint8 arrays [height, width, 3], uint8 tensors
                [3, height, width], or float tensors [3, image_size, image_size] after the evaluation transform.
            prompt: what captions begin with, one for all or one for each; "" is none.
            banned: words, or sequences of words, that no caption may contain behind its prompt. They are compared
                token by token, so a word is banned within longer ones that begin with its tokens.
            strip_prompt: leave the prompt out of `caption`.
            batch_size: images that are captioned together.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: for options that do not fit, or another number of prompts than of images.
        """
        sources = as_sources(images)
        prompts = [prompt] * len(sources) if isinstance(prompt, str) else prompt
        if len(prompts) != len(sources):
            raise ValueError(f"{len(sources)} images but {len(prompts)} prompts: pass one for all or one for each")
        stream = self.stream(zip(sources, prompts, strict=True), "", generation, banned=banned,
                             strip_prompt=strip_prompt, batch_size=batch_size)
        return [unless_error(captioned.result) for captioned in stream]

    def stream(self, images: Iterable[ImageSource | tuple[ImageSource, str]], prompt: str = PROMPT,
               generation: GenerationConfig = CAPTIONING, *, banned: Sequence[str] = (), strip_prompt: bool = False,
               batch_size: int = BATCH, ordered: bool = True) -> Iterator[Captioned]:
        """Caption a stream of images of any length in bounded memory.

        Images are drawn and read by threads ahead of the model; a finished caption makes room for the next image. An
        image that cannot be read, or whose own prompt is too long, has an ImageError for its result.

        Args:
            images: as for a call; one that brings its own prompt is a tuple of both.
            prompt: of all other images.
            ordered: give results in the order of the images, else as they are finished.

        Raises:
            ValueError: for options that do not fit; at once.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        generation = replace(generation, banned=(*generation.banned, *map(self._banned_ids, banned)))
        if reason := _too_long(self.prompt_ids(prompt), generation):
            raise ValueError(reason)

        def read(numbered: tuple[int, ImageSource | tuple[ImageSource, str]]) -> _Read:
            place, given = numbered
            image, own = given if isinstance(given, tuple) else (given, None)
            return self._read(place, image, own, prompt if own is None else own, generation)

        reads = (read for _, read in read_ahead(enumerate(images), read))
        results = evaluated(self.model, self._captioned(reads, generation, batch_size, strip_prompt))
        return in_order(results, _place) if ordered else results

    def stream_pixels(self, pixels: Iterable[Tensor], prompt: str = PROMPT,
                      generation: GenerationConfig = CAPTIONING, *, strip_prompt: bool = False,
                      batch_size: int = BATCH) -> Iterator[Caption | ImageError]:
        """As `stream`, in order, images after the evaluation transform, each float [3, image_size, image_size]."""
        prompt_ids = self.prompt_ids(prompt)
        if reason := _too_long(prompt_ids, generation):
            raise ValueError(reason)
        reads = (_Read(place, image, f"image {place}", None, prompt_ids, image) for place, image in enumerate(pixels))
        results = evaluated(self.model, self._captioned(reads, generation, batch_size, strip_prompt))
        return (captioned.result for captioned in in_order(results, _place))

    def caption_pixels(self, pixels: Tensor, prompt: str = PROMPT, generation: GenerationConfig = CAPTIONING, *,
                       strip_prompt: bool = False) -> list[Caption]:
        """Caption one batch of images after the evaluation transform, float [images, 3, image_size, image_size]."""
        results = self.stream_pixels(pixels, prompt, generation, strip_prompt=strip_prompt,
                                     batch_size=max(1, len(pixels)))
        return [unless_error(result) for result in results]

    def prompt_ids(self, prompt: str) -> list[int]:
        """[DEC] and the prompt's tokens; "" is no prompt."""
        return [self.model.config.tokens.bos, *self.tokenizer.encode(prompt)[1:-1]]

    def _banned_ids(self, word: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(word)[1:-1])
        if not ids:
            raise ValueError(f"the banned word {word!r} has no token: leave it out")
        return ids

    def _read(self, place: int, image: ImageSource, own: str | None, prompt: str,
              generation: GenerationConfig) -> _Read:
        name, prompt_ids = name_of(image, f"image {place}"), self.prompt_ids(prompt)
        pixels = pixels_or_error(image, self.model.config.vision.image_size, name)
        if reason := _too_long(prompt_ids, generation):
            pixels = ImageError(f"{name}: {reason}")
        return _Read(place, image, name, own, prompt_ids, pixels)

    def _captioned(self, reads: Iterator[_Read], generation: GenerationConfig, batch_size: int,
                   strip_prompt: bool) -> Iterator[Captioned]:
        """As they are finished."""
        on_cpu = self.model.vision.cls_token.device.type == "cpu"
        together = min(PACKED_TOGETHER, batch_size) if on_cpu else batch_size  # images encoded at a time
        refused: deque[Captioned] = deque()
        running: dict[int, _Read] = {}  # by the number of the request
        ended = False

        def requests() -> Iterator[Request]:
            nonlocal ended
            numbers = count()
            while len(refused) < MAX_REFUSED:
                if not (some := list(islice(reads, together))):
                    ended = True
                    return
                refused.extend(read.with_result(read.pixels) for read in some if isinstance(read.pixels, ImageError))
                for read, pixels, image_kv in self._encoded(some):
                    running[next(numbers)] = read
                    yield Request(image_kv, read.prompt_ids, _seed(pixels, generation))

        while not ended:
            for number, texts in generate_stream(self.model, requests(), generation, batch_size):
                yield from _drained(refused)
                read = running.pop(number)
                yield read.with_result(self._caption(texts, read, strip_prompt))
            yield from _drained(refused)

    def _encoded(self, reads: Sequence[_Read]) -> Iterator[tuple[_Read, Tensor, ImageKV]]:
        """Those that could be read, each with its pixels and its keys and values."""
        readable = [(read, read.pixels) for read in reads if isinstance(read.pixels, Tensor)]
        for image_embeds in encode_images(self.model, [torch.stack([p for _, p in readable])] if readable else []):
            image_kvs = self.model.stack("decoder").image_kv(image_embeds).split()
            for (read, pixels), image_kv in zip(readable, image_kvs, strict=True):
                yield read, pixels, image_kv

    def _caption(self, texts: Sequence[Generated], read: _Read, strip_prompt: bool) -> Caption | ImageError:
        if not texts:
            return ImageError(f"{read.image}: no text has a probability: take another --dtype, or ban fewer words")
        skipped = len(read.prompt_ids) if strip_prompt else 0
        best, *others = (Caption(self.tokenizer.decode(text.token_ids[skipped:]), text.token_ids, text.score, text.cut)
                         for text in texts)
        return replace(best, others=tuple(others))


def _place(captioned: Captioned) -> int:
    return captioned.place


def _drained(refused: deque[Captioned]) -> Iterator[Captioned]:
    while refused:
        yield refused.popleft()


def _too_long(prompt_ids: Sequence[int], generation: GenerationConfig) -> str | None:
    if len(prompt_ids) < generation.max_length:
        return None
    return (f"the prompt has {len(prompt_ids)} tokens with the first one: max_length ({generation.max_length}) must be "
            "greater")


def _seed(pixels: Tensor, generation: GenerationConfig) -> int:
    if generation.top_p is None:
        return 0
    content = pixels.cpu().float().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7, salt=generation.seed.to_bytes(8)).digest())
