"""The vision encoder compared with transformers', the peers in `peers/` and this machine's matrix products,
in FLOPs per second."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from blip_bench.models import pictures, transformers_models
from blip_bench.peers.build import build
from blip_bench.sides import Targets, comparisons, dtype_of, groups, reference_of
from blip_bench.timing import Call, Case, require
from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import VisionConfig
from blip_fast.tasks.model_loading import load_for_task

TARGETS: Targets = {
    ("ours float32", "openvino float32"): 1.0, ("ours bfloat16", "openvino bfloat16"): 1.0,
    ("ours int8", "openvino int8"): 1.0, ("ours int8", "ours bfloat16"): 1.4,
    ("ours bfloat16", "matrix products bfloat16"): 0.75,
}
PRODUCTS = ("float32", "bfloat16")  # dtypes of the matrix products
# (rows, in, out) of the products; 2308 rows are the tokens of four images.
SHAPES = [(4096, 4096, 4096), (2308, 768, 3072), (2308, 3072, 768), (2308, 768, 2304)]
PEAK_SECONDS = 0.5  # duration of one call
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 0.2}  # relative error


def cases(directory: Path, images: int, dtypes: Sequence[str], peers: Collection[str]) -> Iterator[Case]:
    """`images` random pictures, with the model in `directory` and with `peers`."""
    ours = {dtype: load_for_task(directory, dtype=dtype, device="cpu")[0] for dtype in dtypes}
    config = ours[dtypes[0]].config.vision
    pixels = pictures(images, config.image_size)
    calls: dict[str, Call] = {f"ours {dtype}": partial(encode, model, pixels)
                              for dtype, model in ours.items()}
    others = build(directory, peers, dtypes, pixels, captions=False)
    calls |= {name: partial(peer.encode, pixels) for name, peer in others.items()}
    calls |= {name: partial(their_encode, model.vision_model, pixels)
              for name, model in transformers_models(directory, dtypes, peers).items()}
    flops = dict.fromkeys(calls, images * flops_of_image(config))
    for dtype in dtypes:
        if dtype in PRODUCTS:
            name = f"matrix products {dtype}"
            calls[name], flops[name] = fastest_product(getattr(torch, dtype))
    yield Case("encode", calls, comparisons(calls, TARGETS), images, "images", flops, check,
               groups=groups(calls))


def encode(model: BlipModel, pixels: Tensor) -> Tensor:
    with evaluating(model):
        return torch.cat(list(encode_images(model, pixels)))


@torch.no_grad()
def their_encode(model: Any, pixels: Tensor) -> Tensor:
    return model(pixels.to(model.dtype)).last_hidden_state


def flops_of_image(config: VisionConfig) -> float:
    """FLOPs of the matrix products only, a multiply-add as two: patches, then per block qkv, out, MLP and
    attention's two."""
    patches, width, tokens = config.tokens - 1, config.width, config.tokens
    block = tokens * width * width * (4 + 2 * config.mlp_ratio) + 2 * tokens * tokens * width
    return 2 * (patches * 3 * config.patch_size**2 * width + config.layers * block)


def fastest_product(dtype: torch.dtype) -> tuple[Call, float]:
    """The matrix product that runs fastest here, repeated for about half a second, and its FLOPs."""
    best = (float("inf"), 0.0, lambda: None)
    for (rows, width, out), product_of in product(SHAPES, (torch.nn.functional.linear, torch.matmul)):
        weight_shape = (out, width) if product_of is torch.nn.functional.linear else (width, out)
        call = partial(product_of, torch.randn(rows, width).to(dtype), torch.randn(weight_shape).to(dtype))
        flops = 2.0 * rows * width * out
        best = min(best, (_seconds(call) / flops, flops, call), key=lambda each: each[0])
    seconds_per_flop, flops, call = best
    times = max(1, round(PEAK_SECONDS / (seconds_per_flop * flops)))
    return partial(_repeat, call, times), times * flops


def _seconds(call: Callable[[], Any]) -> float:
    """The least of three times, after a warm-up call."""
    taken = []
    for _ in range(4):
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return min(taken[1:])


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def check(results: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of image_embeds against the reference's."""
    encoded = {name: embeds.float() for name, embeds in results.items() if embeds is not None}
    reference = reference_of(encoded)
    theirs, found = encoded.pop(reference), {}
    for name, embeds in encoded.items():
        error = float((embeds - theirs).norm() / theirs.norm())
        found[f"relative error, {name}"] = error
        require(error < TOLERANCES[dtype_of(name)],
                f"image_embeds of {name} are {error:.1e} off those of {reference}")
    return found
