"""Calls of the ops on random data, at the sizes of BLIP's training and generation. Tuning measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

# A name; a call, forward and backward, that returns its results.
Workload = tuple[str, Callable[[], Sequence[Tensor]]]


def workloads(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """Yield the workloads of an op. Together they use every kind of launch in its table.

    Raises:
        ValueError: the op has none.
    """
    if op not in _OPS:
        raise ValueError(f"{op!r} has no workload to tune with: choose one of {', '.join(_OPS)}")
    return _OPS[op](dtype, device)


def _attention(dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """Self-attention of 64 images of 577 tokens, 768 wide."""
    from blip_kernels.attention import attention

    offsets = torch.arange(0, 64 * 577 + 1, 577, dtype=torch.int32, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        torch.manual_seed(0)  # drops the same weights each time
        return attention(q, k, v, offsets, offsets, dropout=dropout, backend="triton")

    for head_dim, dropout in product((32, 64, 128), (0.0, 0.1)):
        shape = (64 * 577, 768 // head_dim, head_dim)
        inputs = (_random(*shape, dtype=dtype, device=device) for _ in range(3))
        run = _with_gradients(partial(call, dropout=dropout), *inputs)
        yield f"images, head_dim {head_dim}, dropout {dropout}", run


def _decode_attention(dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """One step of generation: three beams of 8 images of 577 tokens, layer 0 of 12; their 20 tokens so far."""
    from blip_kernels.decode_attention import cached_attention, decode_attention

    images, beams = 8, 3
    for head_dim in (32, 64, 128):
        heads = 768 // head_dim
        q = _random(images * beams, heads, head_dim, dtype=dtype, device=device)
        kv = _random(12, 2, images, heads, 577, head_dim, dtype=dtype, device=device).transpose(3, 4)
        lengths = torch.full((images,), 577, dtype=torch.int32, device=device)
        yield f"images, head_dim {head_dim}", lambda q=q, kv=kv, lengths=lengths: [
            decode_attention(q, kv[0, 0], kv[0, 1], lengths, backend="triton")]
        cache = _random(2, heads, len(q) * 32, head_dim, dtype=dtype, device=device).transpose(1, 2)
        slots = torch.randint(cache.shape[1], (len(q), 20), device=device)
        lengths = torch.full((len(q),), 20, dtype=torch.int32, device=device)
        yield f"tokens, head_dim {head_dim}", lambda q=q, cache=cache, slots=slots, lengths=lengths: [
            cached_attention(q, cache[0], cache[1], slots, lengths, backend="triton")]


def _contrastive(dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """4,096 rows against as many keys of the batch and 57,600 queued ones."""
    from blip_kernels.contrastive import contrastive

    for width in (64, 128, 256):
        queries, keys, momentum, queue = (
            torch.nn.functional.normalize(_random(rows, width, dtype=dtype, device=device), dim=1)
            for rows in (4096, 4096, 4096, 57600))
        temperature = torch.tensor(0.07, device=device)
        yield f"width {width}", _with_gradients(
            lambda q, k, t, m=momentum, queue=queue: contrastive(q, m, k, queue, t, 0.4, backend="triton"),
            queries, keys, temperature)


def _hard_negatives(dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """One draw for each of 512 rows among 16,384 keys, the keys of 32 ranks."""
    from blip_kernels.hard_negatives import hard_negatives

    for width in (64, 128, 256):
        queries, keys = (torch.nn.functional.normalize(_random(rows, width, dtype=dtype, device=device),
                                                       dim=1) for rows in (512, 16384))
        temperature = torch.tensor(0.07, device=device)
        yield f"width {width}", lambda queries=queries, keys=keys, temperature=temperature: [
            hard_negatives(queries, keys, temperature, floor=1e-4, seed=1, backend="triton")]


def _linear_cross_entropy(dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """Captions of a batch, 2,048 tokens, and BERT's vocabulary with BLIP's two tokens."""
    from blip_kernels.linear_cross_entropy import linear_cross_entropy

    shapes = (2048, 768), (30524, 768), (30524,)
    hidden, weight, bias = (_random(*shape, dtype=dtype, device=device) for shape in shapes)
    targets = torch.randint(30524, (2048,), device=device)
    yield "2,048 tokens", _with_gradients(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, bias, targets, backend="triton"),
        hidden, weight * 0.02, bias)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _with_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Return the call with the gradients of its inputs, for one fixed random upstream gradient."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.no_grad():
        out = call(*inputs)
    upstream = torch.randn_like(out)

    def run() -> Sequence[Tensor]:
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    return run


_OPS = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "contrastive": _contrastive,
    "hard_negatives": _hard_negatives,
    "linear_cross_entropy": _linear_cross_entropy,
}
