"""Which implementation of an op runs, and why.

`auto` takes the fastest implementation that can run the call. Naming one that cannot run it is an error that says
why: nothing falls back silently. The environment variable `BLIP_FAST_ATTENTION` names the choice where a call does
not.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

ATTENTION_BACKENDS = ("auto", "sdpa", "sliced", "reference")
ATTENTION_VARIABLE = "BLIP_FAST_ATTENTION"


def attention_backend(q: Tensor, requested: str | None = None) -> str:
    """Resolve the attention implementation for a call.

    `auto` is `sliced` for 16-bit types on a CPU, where PyTorch's fused attention is several times slower, else `sdpa`.

    Args:
        q: the call's queries.
        requested: one of `ATTENTION_BACKENDS`, or None to take `BLIP_FAST_ATTENTION` (default `auto`).

    Returns:
        `"sdpa"`, `"sliced"` or `"reference"`.

    Raises:
        ValueError: the name is not one of `ATTENTION_BACKENDS`, or `sliced` is asked for off the CPU.
    """
    name = requested or os.environ.get(ATTENTION_VARIABLE) or "auto"
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(ATTENTION_BACKENDS)}")
    on_cpu = q.device.type == "cpu"
    if name == "sliced" and not on_cpu:
        raise ValueError(f"attention backend 'sliced' runs on a CPU only, and q is on {q.device}: choose auto or sdpa")
    if name == "auto":
        return "sliced" if on_cpu and q.dtype in (torch.bfloat16, torch.float16) else "sdpa"
    return name
