"""Captions of 20 tokens, with three beams and greedy, compared with transformers' `generate` and the peers in
`peers/`. All have the same weights, pictures and prompt. Timed from transformed pictures to texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_bench.models import TOKENS, pictures, transformers_models
from blip_bench.peers import search
from blip_bench.peers.build import build
from blip_bench.sides import Targets, comparisons, groups, reference_of
from blip_bench.timing import Case, require
from blip_fast.generate import GenerationConfig
from blip_fast.tasks.captioner import PROMPT, Captioner

TARGETS: dict[int, Targets] = {  # by beams
    3: {("ours float32", "openvino float32"): 1.3, ("ours float32", "transformers float32"): 2.5,
        ("ours bfloat16", "openvino bfloat16"): 1.4, ("ours bfloat16", "transformers bfloat16"): 2.5,
        ("ours bfloat16", "transformers float32"): 9.0},
    1: {("ours float32", "openvino float32"): 1.15, ("ours bfloat16", "openvino bfloat16"): 1.2,
        ("ours bfloat16", "transformers bfloat16"): 1.6, ("ours bfloat16", "transformers float32"): 6.0},
}


def cases(directory: Path, images: int, dtypes: Sequence[str], peers: Collection[str]) -> Iterator[Case]:
    """Three beams, then greedy, on `images` random pictures: the captioner in `directory`, and `peers`."""
    ours = {dtype: Captioner.from_pretrained(directory, dtype=dtype, device="cpu") for dtype in dtypes}
    captioner = ours[dtypes[0]]
    pixels = pictures(images, captioner.model.config.vision.image_size)
    prompt, end = torch.tensor(captioner.prompt_ids(PROMPT)), captioner.tokenizer.sep_id
    theirs = transformers_models(directory, dtypes, peers)
    others = build(directory, peers, dtypes, pixels, captions=True)
    for beams, targets in TARGETS.items():
        config = full_length(beams)
        calls = {f"ours {dtype}": partial(captions, model, config) for dtype, model in ours.items()}
        calls |= {name: partial(search.captions, peer, prompt, end, beams) for name, peer in others.items()}
        # transformers drops the prompt's last token, [SEP].
        calls |= {name: partial(their_captions, model, torch.tensor([[*prompt, end]]), config)
                  for name, model in theirs.items()}
        yield Case(f"{beams} beams" if beams > 1 else "greedy",
                   {name: partial(call, pixels) for name, call in calls.items()},
                   comparisons(calls, targets), images, "images", check=check,
                   warm_up=partial(warm_up, calls, pixels), groups=groups(calls))


def full_length(beams: int) -> GenerationConfig:
    """Captions of full length: with random weights they would otherwise end at random."""
    return GenerationConfig(beams=beams, max_length=TOKENS, min_length=TOKENS)


def captions(captioner: Captioner, config: GenerationConfig, pixels: Tensor) -> list[list[int]]:
    return [caption.token_ids for caption in captioner.caption_pixels(pixels, generation=config)]


def their_captions(model: Any, prompt: Tensor, config: GenerationConfig, pixels: Tensor) -> list[list[int]]:
    texts = model.generate(pixels.to(model.dtype), prompt.repeat(len(pixels), 1), num_beams=config.beams,
                           max_length=config.max_length, min_length=config.min_length, do_sample=False)
    return texts.tolist()


def warm_up(calls: Mapping[str, Callable[[Tensor], Any]], pixels: Tensor) -> None:
    """Call each with one picture; with all pictures if it compiles for their number."""
    for name, call in calls.items():
        call(pixels if name.startswith("compiled") else pixels[:1])


def check(results: Mapping[str, list[list[int]]]) -> dict[str, float]:
    """In float32 all captions must be equal; with fewer bits two beams may swap places."""
    reference = reference_of(results)
    found = {}
    for name in results.keys() - {reference}:
        pairs = zip(results[name], results[reference], strict=True)
        same = [one == other for one, other in pairs]
        found[f"same captions, {name}"] = sum(same) / len(same)
        require("float32" not in name or all(same), f"captions of {name} are not those of {reference}")
    return found
