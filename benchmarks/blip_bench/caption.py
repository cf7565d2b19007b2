"""Captions of 20 tokens, with three beams and greedy, beside transformers' `generate`: the same weights, pictures and
prompt. From transformed pictures to texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_bench.models import DTYPES, have_transformers, load_transformers, pictures
from blip_bench.timing import Case, Comparison, require
from blip_fast.generate import GenerationConfig
from blip_fast.tasks.caption import PROMPT, Captioner

TOKENS = 20  # the prompt included
TARGETS = {3: (2.5, 9.0), 1: (1.6, 6.0)}  # beams: beside transformers in bfloat16, in float32


def cases(directory: Path, images: int) -> Iterator[Case]:
    """Three beams, then greedy, of `images` random pictures, by the captioner in `directory`."""
    ours = {dtype: Captioner.from_pretrained(directory, dtype=dtype, device="cpu") for dtype in DTYPES}
    theirs = {dtype: load_transformers(directory, dtype) for dtype in DTYPES if have_transformers()}
    captioner = ours["float32"]
    pixels = pictures(images, captioner.model.config.vision.image_size)
    prompt = torch.tensor([[*captioner.prompt_ids(PROMPT), captioner.tokenizer.sep_id]])  # their generate drops [SEP]
    for beams, (in_bfloat16, in_float32) in TARGETS.items():
        config = full_length(beams)
        calls = {f"ours {dtype}": partial(captions, model, config) for dtype, model in ours.items()}
        calls |= {f"transformers {dtype}": partial(their_captions, model, prompt, config)
                  for dtype, model in theirs.items()}
        comparisons = (Comparison("ours bfloat16", "transformers bfloat16", in_bfloat16),
                       Comparison("ours bfloat16", "transformers float32", in_float32),
                       Comparison("ours float32", "transformers float32"))
        yield Case(f"{beams} beams" if beams > 1 else "greedy",
                   {name: partial(call, pixels) for name, call in calls.items()},
                   comparisons if theirs else (), images, "images", check=check,
                   warm_up=partial(call_all, calls, pixels[:1]))


def full_length(beams: int) -> GenerationConfig:
    """No caption may end early: random weights would end at random."""
    return GenerationConfig(beams=beams, max_length=TOKENS, min_length=TOKENS)


def captions(captioner: Captioner, config: GenerationConfig, pixels: Tensor) -> list[list[int]]:
    return [caption.token_ids for caption in captioner.caption_pixels(pixels, generation=config)]


def their_captions(model: Any, prompt: Tensor, config: GenerationConfig, pixels: Tensor) -> list[list[int]]:
    texts = model.generate(pixels.to(model.dtype), prompt.repeat(len(pixels), 1), num_beams=config.beams,
                           max_length=config.max_length, min_length=config.min_length, do_sample=False)
    return texts.tolist()


def call_all(calls: Mapping[str, Callable[[Tensor], Any]], pixels: Tensor) -> None:
    for call in calls.values():
        call(pixels)


def check(results: Mapping[str, list[list[int]]]) -> dict[str, float]:
    """In float32 every caption is the same; in 16 bits two beams may change places."""
    found = {}
    for dtype in DTYPES:
        if f"transformers {dtype}" in results:
            pairs = zip(results[f"ours {dtype}"], results[f"transformers {dtype}"], strict=True)
            same = [ours == theirs for ours, theirs in pairs]
            found[f"same captions, {dtype}"] = sum(same) / len(same)
            require(dtype != "float32" or all(same), "captions in float32 are not those of transformers")
    return found
