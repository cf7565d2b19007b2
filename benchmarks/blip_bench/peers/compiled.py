"""The three modules under `torch.compile` with frozen weights, which it prepacks: the best of PyTorch alone.

Texts have a fixed number of places for keys and values, so that a step is compiled once, not for each length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip_bench.models import TOKENS
from blip_bench.peers.modules import Cut, Peer, Step, empty_past, step_inputs

DTYPES = ("float32", "bfloat16")


def peers(parts: Cut, pixels: Tensor, dtypes: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    """A peer for each supported dtype. `pixels` is not used. The first call with a new shape compiles."""
    for dtype in dtypes:
        if dtype in DTYPES:
            kind = getattr(torch, dtype)
            begin = None
            if parts.image_kv is not None and parts.decoder is not None:
                decoder = copy.deepcopy(parts.decoder).to(kind)
                decoder.fixed = True
                begin = partial(_begin, _compile(copy.deepcopy(parts.image_kv).to(kind)), _compile(decoder),
                                partial(empty_past, decoder, dtype=kind, places=TOKENS))
            encode = partial(_encode, _compile(copy.deepcopy(parts.vision).to(kind)), kind)
            yield f"compiled {dtype}", Peer(encode, begin, own_threads=False)


def _compile(module: Any) -> Any:
    return torch.compile(module, dynamic=False, options={"freezing": True})


@torch.inference_mode()
def _encode(vision: Callable[..., Tensor], dtype: torch.dtype, pixels: Tensor) -> Tensor:
    return torch.cat([vision(picture) for picture in pixels.to(dtype).split(1)])


@torch.inference_mode()
def _begin(image_kv: Any, decoder: Any, empty: Callable[[int], list[Tensor]], embeds: Tensor) -> Step:
    of_images = [part.contiguous() for part in image_kv(embeds)]
    past = empty(len(embeds))

    def step(ids: Tensor, position: int, order: Tensor) -> Tensor:
        nonlocal past
        # Beams start from one row. Reorder them here, or a step would compile twice.
        if len(order) != len(past[0]):
            past, order = [part.index_select(0, order) for part in past], torch.arange(len(order))
        logits, *past = decoder(*step_inputs(ids, position, order, embeds.dtype, TOKENS), *past, *of_images)
        return logits.float()

    return step
