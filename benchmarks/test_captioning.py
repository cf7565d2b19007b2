"""Captions of 20 tokens compared with peers, throughput by batch and beams, and memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from blip_bench.cases.caption import PROMPT, captions, cases, full_length, their_captions
from blip_bench.memory import added_memory
from blip_bench.models import load_transformers, pictures
from blip_bench.timing import Call, Case

from blip_fast.tasks.captioner import Captioner

IMAGE_SIZE = 384


@pytest.fixture(scope="module")
def by_name(checkpoint, dtypes, peers) -> dict[str, Case]:
    return {case.name: case for case in cases(checkpoint("caption"), 2, dtypes, peers)}


@pytest.mark.parametrize("search", ["3 beams", "greedy"])
def test_captioning(side_by_side, by_name, search):
    side_by_side(by_name[search], 2)


@pytest.fixture(scope="module")
def captioner(checkpoint) -> Captioner:
    return Captioner.from_pretrained(checkpoint("caption"), dtype="bfloat16", device="cpu")


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("beams", [1, 3])
def test_batch_and_beams(side_by_side, captioner, batch, beams):
    pixels = pictures(batch, IMAGE_SIZE)
    call = partial(captions, captioner, full_length(beams))
    side_by_side(Case(f"{batch} images, {beams} beams", {"ours bfloat16": partial(call, pixels)},
                      amount=batch, unit="images", warm_up=partial(call, pixels[:1])), 2)


def test_peak_memory(checkpoint, record_memory):
    added = {side: added_memory(captions_alone, side, checkpoint("caption"))
             for side in ("ours bfloat16", "transformers bfloat16")}
    record_memory("4 captions, 3 beams", added)


def captions_alone(side: str, directory: Path) -> Call:
    config, pixels = full_length(3), pictures(4, IMAGE_SIZE)
    captioner = Captioner.from_pretrained(directory, dtype="bfloat16", device="cpu")
    if side.startswith("ours"):
        return partial(captions, captioner, config, pixels)
    prompt = torch.tensor([[*captioner.prompt_ids(PROMPT), captioner.tokenizer.sep_id]])
    return partial(their_captions, load_transformers(directory, "bfloat16"), prompt, config, pixels)
