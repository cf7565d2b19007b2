"""Which implementation of an op runs, and why.

`auto` takes the fastest implementation that can run the call. Naming one that cannot run is an error that
says why: nothing falls back silently. If a call names none, the environment variable `BLIP_FAST_ATTENTION`
does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from blip_kernels.cpu import processor
from blip_kernels.cpu.products import has_products

ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "sliced", "flash_attn", "xformers", "reference")
ATTENTION_VARIABLE = "BLIP_FAST_ATTENTION"
HEAD_WIDTHS = (32, 64, 128)  # of Triton's attention
HALF = (torch.float16, torch.bfloat16)


def attention_backend(q: Tensor, requested: str | None = None) -> str:
    """Resolve the attention implementation for a call.

    `auto` is `triton` on an NVIDIA GPU if heads are 32, 64 or 128 wide. On a CPU it is `sliced` for 16-bit
    types that the processor multiplies, since PyTorch's fused attention is several times slower there. With
    AMX the fused forward is faster, and only calls that need gradients take `sliced`. Everywhere else it is
    `sdpa`. While `torch.compile` traces it is `triton` or `reference`, each one node of the graph; the others
    read lengths on the host, which breaks the graph.

    Args:
        q: the call's queries [rows, heads, head_dim].
        requested: one of `ATTENTION_BACKENDS`, or None to take `BLIP_FAST_ATTENTION` (default `auto`).

    Returns:
        One of `ATTENTION_BACKENDS` except `auto`.

    Raises:
        ValueError: the name is not one of `ATTENTION_BACKENDS`, or it cannot run this call; the message says
            why, and which ones can.
    """
    name = requested or os.environ.get(ATTENTION_VARIABLE) or "auto"
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(ATTENTION_BACKENDS)}")
    if name == "auto":
        if torch.compiler.is_compiling():
            return "triton" if q.device.type == "cuda" and not attention_cannot("triton", q) else "reference"
        if q.device.type == "cpu":
            fused = processor.has_amx() and not (torch.is_grad_enabled() and q.requires_grad)
            return "sliced" if q.dtype in HALF and has_products(q.dtype) and not fused else "sdpa"
        return "sdpa" if attention_cannot("triton", q) else "triton"
    if reason := attention_cannot(name, q):
        able = [other for other in ATTENTION_BACKENDS[1:] if not attention_cannot(other, q)]
        raise ValueError(f"attention backend {name!r} cannot run: {reason}; here can run: {', '.join(able)}")
    return name


def attention_cannot(name: str, q: Tensor) -> str | None:
    """Return why the attention backend `name` cannot run a call with queries `q`, or None if it can."""
    if name == "triton":
        if q.shape[-1] not in HEAD_WIDTHS:
            return f"heads are {q.shape[-1]} wide and its kernels take {', '.join(map(str, HEAD_WIDTHS))}"
        if q.dtype not in (*HALF, torch.float32):
            return f"its kernels take float16, bfloat16 and float32, not {q.dtype}"
        return triton_cannot(q)
    if name == "sliced" and q.device.type != "cpu":
        return f"it runs on a CPU only, and q is on {q.device}"
    if name in ("flash_attn", "xformers"):
        if find_spec(name) is None:
            return f"{name.replace('_', '-')} is not installed (it needs CUDA to build)"
        if q.device.type != "cuda":
            return f"it runs on a GPU only, and q is on {q.device}"
        if name == "flash_attn" and q.dtype not in HALF:
            return f"it takes float16 and bfloat16, not {q.dtype}"
    return None


def op_backend(x: Tensor, requested: str | None = None) -> str:
    """Resolve the implementation of an op that has a Triton kernel and an eager twin.

    Args:
        x: any of the call's tensors.
        requested: `auto` (the default: Triton on an NVIDIA GPU, else the twin), `triton` or `reference` (the
            twin).

    Returns:
        `"triton"` or `"reference"`.

    Raises:
        ValueError: another name, or `triton` if it cannot run, with the reason.
    """
    if requested not in (None, "auto", "triton", "reference"):
        raise ValueError(f"backend {requested!r} is not known: choose one of auto, triton, reference")
    if requested == "triton" and (reason := triton_cannot(x)):
        raise ValueError(f"backend 'triton' cannot run: {reason}; choose auto or reference")
    if requested in (None, "auto"):
        return "triton" if x.device.type != "cpu" and not triton_cannot(x) else "reference"
    return requested


def triton_cannot(x: Tensor) -> str | None:
    """Return why Triton cannot run a call on `x`, or None if it can."""
    try:
        from blip_kernels.gpu.kernel_launch import why_not
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return why_not(x)
