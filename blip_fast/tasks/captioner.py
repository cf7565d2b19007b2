"""Captions for images (BLIP section 5.2): for a few, or for a stream of any length."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from blip_fast.generate import Generated, Generation, GenerationConfig, Request
from blip_fast.inference.encoding import encode_images, evaluated, images_together
from blip_fast.media.images import ImageError, ImageSource, name_of, unless_error
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import image_states
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.parallel.read_ahead import in_order, read_ahead
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixels_or_error

PROMPT = "a picture of"
CAPTIONING = GenerationConfig(beams=3, max_length=20, min_length=5)  # as published for COCO
BATCH = 16


@dataclass(frozen=True)
class Caption:
    """A caption.

    `caption` is the text of `token_ids` without special tokens, the prompt included unless it was stripped.
    `token_ids` is what transformers' `generate` returns for the image: [DEC], the prompt, the generated
    tokens and [SEP], which is missing where the caption is `cut`: `max_length` ended it before it had come to
    its end. `score` follows the beam rule of the `GenerationConfig`. `others` are the next best, best first,
    where `n_best` asks for them. Where they were re-ranked (`tasks/reranking.py`) `rerank` is what the order
    goes by.
    """

    caption: str
    token_ids: list[int]
    score: float
    cut: bool
    others: tuple[Caption, ...] = ()
    rerank: float | None = None


@dataclass(frozen=True)
class Captioned:
    """What became of one image: its place in the stream, from 0; the image as it was given; its path or name,
    or "image PLACE"; the prompt that it brought, if any."""

    place: int
    source: ImageSource
    image: str
    prompt: str | None
    result: Caption | ImageError


@dataclass(frozen=True)
class Read:
    """One image with its prompt's tokens; pixels float32 [3, image_size, image_size], or why there is nothing
    to caption."""

    place: int
    source: ImageSource
    image: str
    prompt: str | None
    prompt_ids: list[int]
    pixels: Tensor | ImageError

    def with_result(self, result: Caption | ImageError) -> Captioned:
        return Captioned(self.place, self.source, self.image, self.prompt, result)


class Captioner(PretrainedTask):
    """Writes captions, with a captioning checkpoint such as `Salesforce/blip-image-captioning-base`.

    Examples:
        >>> captioner = Captioner.from_pretrained(checkpoint)
        >>> captions = captioner(photos)
        >>> len(captions), type(captions[0].caption)
        (2, <class 'str'>)

    A caption depends on its image, its prompt and the options alone, never on the other images, their order
    or `batch_size`. Sampling draws from a seed made of `generation.seed` and the image's own pixels, whatever
    its name or place, so two copies of an image are captioned alike.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model has no text decoder."""
        model.stack("decoder")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Iterable[ImageSource], prompt: str | Sequence[str] = PROMPT,
                 generation: GenerationConfig = CAPTIONING, *, banned: Sequence[str] = (),
                 strip_prompt: bool = False, batch_size: int = BATCH) -> list[Caption]:
        """Caption one image or many.

        Args:
            images: paths, `file://` URLs, encoded bytes, Pillow images, uint8 arrays [height, width, 3],
                uint8 tensors [3, height, width], or float tensors [3, image_size, image_size] after the
                evaluation transform.
            prompt: what captions begin with, one for all or one for each; "" is none.
            banned: words, or sequences of words, that no caption may contain after its prompt. They are
                compared token by token, so a word is banned within longer ones that begin with its tokens.
            strip_prompt: leave the prompt out of `caption`.
            batch_size: images that are captioned together.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: for options that do not fit, or another number of prompts than of images.
        """
        sources = as_sources(images)
        prompts = [prompt] * len(sources) if isinstance(prompt, str) else prompt
        if len(prompts) != len(sources):
            raise ValueError(f"{len(sources)} images but {len(prompts)} prompts: pass one for all or one for "
                             "each")
        stream = self.stream(zip(sources, prompts, strict=True), "", generation, banned=banned,
                             strip_prompt=strip_prompt, batch_size=batch_size)
        return [unless_error(captioned.result) for captioned in stream]

    def stream(self, images: Iterable[ImageSource | tuple[ImageSource, str]], prompt: str = PROMPT,
               generation: GenerationConfig = CAPTIONING, *, banned: Sequence[str] = (),
               strip_prompt: bool = False,
               batch_size: int = BATCH, ordered: bool = True) -> Iterator[Captioned]:
        """Caption a stream of images of any length in bounded memory.

        Images are drawn and read by threads ahead of the model; a finished caption makes room for the next
        image. An image that cannot be read, or whose own prompt is too long, has an ImageError for its
        result.

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
        self.checked_prompt(prompt, generation)

        def read(numbered: tuple[int, ImageSource | tuple[ImageSource, str]]) -> Read:
            place, given = numbered
            image, own = given if isinstance(given, tuple) else (given, None)
            return self.read(place, image, own, prompt if own is None else own, generation)

        reads = (read for _, read in read_ahead(enumerate(images), read))
        results = evaluated(self.model, self._captions(reads, generation, batch_size, strip_prompt))
        return in_order(results, _place) if ordered else results

    def stream_pixels(self, pixels: Iterable[Tensor], prompt: str = PROMPT,
                      generation: GenerationConfig = CAPTIONING, *, strip_prompt: bool = False,
                      batch_size: int = BATCH) -> Iterator[Caption | ImageError]:
        """As `stream`, in order, for images after the evaluation transform, each float [3, image_size,
        image_size]."""
        prompt_ids = self.checked_prompt(prompt, generation)
        reads = (Read(place, image, f"image {place}", None, prompt_ids, image)
                 for place, image in enumerate(pixels))
        results = evaluated(self.model, self._captions(reads, generation, batch_size, strip_prompt))
        return (captioned.result for captioned in in_order(results, _place))

    def caption_pixels(self, pixels: Tensor, prompt: str = PROMPT, generation: GenerationConfig = CAPTIONING,
                       *, strip_prompt: bool = False) -> list[Caption]:
        """Caption one batch of images after the evaluation transform, float [images, 3, image_size,
        image_size]."""
        results = self.stream_pixels(pixels, prompt, generation, strip_prompt=strip_prompt,
                                     batch_size=max(1, len(pixels)))
        return [unless_error(result) for result in results]

    def prompt_ids(self, prompt: str) -> list[int]:
        """[DEC] and the prompt's tokens; "" is no prompt."""
        return [self.model.config.tokens.bos, *self.tokenizer.encode(prompt)[1:-1]]

    def checked_prompt(self, prompt: str, generation: GenerationConfig) -> list[int]:
        """As `prompt_ids`. Raises ValueError where they leave no room below `max_length`."""
        prompt_ids = self.prompt_ids(prompt)
        if reason := _too_long(prompt_ids, generation):
            raise ValueError(reason)
        return prompt_ids

    def _banned_ids(self, word: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(word)[1:-1])
        if not ids:
            raise ValueError(f"the banned word {word!r} has no token: leave it out")
        return ids

    def read(self, place: int, image: ImageSource, own: str | None, prompt: str,
             generation: GenerationConfig) -> Read:
        """What a `CaptionBatch` takes: image number `place`, which brought the prompt `own`; its caption
        continues `prompt`. An image that cannot be read, or whose prompt is too long, has an error for its
        pixels."""
        name, prompt_ids = name_of(image, f"image {place}"), self.prompt_ids(prompt)
        pixels = pixels_or_error(image, self.model.config.vision.image_size, name)
        if reason := _too_long(prompt_ids, generation):
            pixels = ImageError(f"{name}: {reason}")
        return Read(place, image, name, own, prompt_ids, pixels)

    def _captions(self, reads: Iterator[Read], generation: GenerationConfig, batch_size: int,
                   strip_prompt: bool) -> Iterator[Captioned]:
        """As they are finished."""
        batch = CaptionBatch(self, generation, batch_size, strip_prompt)
        while True:
            while batch.free and (some := list(islice(reads, batch.together))):
                yield from batch.enter(some)
            if batch.idle:
                return
            yield from batch.step()


class CaptionBatch:
    """Images whose captions are being written: they enter and leave one by one, as they come and are
    finished."""

    def __init__(self, captioner: Captioner, generation: GenerationConfig, batch_size: int,
                 strip_prompt: bool = False) -> None:
        """`batch_size` images at a time. Raises ValueError for options that do not fit."""
        self.together = images_together(captioner.model, batch_size)
        self._captioner, self._strip_prompt = captioner, strip_prompt
        self._generation = Generation(captioner.model, generation, batch_size)
        self._waiting: deque[tuple[int, Request]] = deque()  # wait for a slot
        self._running: dict[int, Read] = {}  # by place, those that wait included

    @property
    def free(self) -> int:
        """How many images there is room for."""
        return max(0, self._generation.free - len(self._waiting))

    @property
    def idle(self) -> bool:
        return not self._running

    def __len__(self) -> int:
        """How many images are in."""
        return len(self._running)

    @torch.inference_mode()
    def enter(self, reads: Sequence[Read]) -> list[Captioned]:
        """Encode images together. Their places must differ from those of all images that are in. Images that
        find no room wait. Returns those that could not be read."""
        captioner, config = self._captioner, self._generation.config
        readable = [(read, read.pixels) for read in reads if isinstance(read.pixels, Tensor)]
        pixels = [torch.stack([pixels for _, pixels in readable])] if readable else []
        for image_embeds in encode_images(captioner.model, pixels):
            for (read, pixels), states in zip(readable, image_states(image_embeds).split(), strict=True):
                self._running[read.place] = read
                self._waiting.append((read.place, Request(states, read.prompt_ids, _seed(pixels, config))))
        return [read.with_result(read.pixels) for read in reads if isinstance(read.pixels, ImageError)]

    def leave(self, place: int) -> None:
        """Stop writing an image's caption; nothing happens if it is finished."""
        if self._running.pop(place, None) is not None:
            self._generation.leave(place)
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != place)

    def step(self) -> list[Captioned]:
        """Compute a token of every caption; returns those that this finishes."""
        while self._waiting and self._generation.enter(*self._waiting[0]):
            self._waiting.popleft()
        return [self._result(place, texts) for place, texts in self._generation.step()]

    def _result(self, place: int, texts: Sequence[Generated]) -> Captioned:
        read, decode = self._running.pop(place), self._captioner.tokenizer.decode
        if not texts:
            return read.with_result(
                ImageError(f"{read.image}: no text has a probability: take another --dtype, or ban fewer "
                           "words"))
        skipped = len(read.prompt_ids) if self._strip_prompt else 0
        best, *others = (Caption(decode(text.token_ids[skipped:]), text.token_ids, text.score, text.cut)
                         for text in texts)
        return read.with_result(replace(best, others=tuple(others)))


def _place(captioned: Captioned) -> int:
    return captioned.place


def _too_long(prompt_ids: Sequence[int], generation: GenerationConfig) -> str | None:
    if len(prompt_ids) < generation.max_length:
        return None
    return (f"the prompt has {len(prompt_ids)} tokens with the first one: max_length "
            f"({generation.max_length}) must be greater")


def _seed(pixels: Tensor, generation: GenerationConfig) -> int:
    if generation.top_p is None:
        return 0
    content = pixels.cpu().float().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7, salt=generation.seed.to_bytes(8)).digest())
