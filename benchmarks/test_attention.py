"""Attention implementations at the visual lengths of 96, 224 and 384 px. "Ours" is what `auto` selects."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from blip_bench.timing import Case
from blip_kernels import attention
from blip_kernels.backends import attention_backend
from torch import Tensor

SHAPES = {37: (64, 4, 32), 197: (8, 12, 64), 577: (2, 12, 64)}  # tokens: images, heads, head width
ROUNDS = 7
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def plain(images: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula for all images and heads at once: [images × tokens, heads, head_dim] → the same shape."""
    q, k, v = (x.view(images, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", SHAPES)
def test_attention(side_by_side, tokens, dtype, backward):
    images, heads, head_dim = SHAPES[tokens]
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(images * tokens, heads, head_dim, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    offsets = torch.arange(images + 1, dtype=torch.int32) * tokens

    def run(implementation) -> tuple[Tensor, ...]:
        out = implementation(*inputs)
        return torch.autograd.grad(out, inputs, upstream) if backward else (out,)

    implementations = {name: partial(attention, q_offsets=offsets, kv_offsets=offsets, backend=name)
                       for name in ("sdpa", "sliced")} | {"plain": partial(plain, images)}
    ours = implementations.pop(attention_backend(q))
    flops = (14 if backward else 4) * images * tokens**2 * heads * head_dim  # 2 products forward, 5 backward
    name = f"{tokens} tokens, {str(dtype).removeprefix('torch.')}, forward{' + backward' * backward}"
    peers = {name: partial(run, peer) for name, peer in implementations.items()}
    results = side_by_side(Case.beside(name, partial(run, ours), peers, amount=images, unit="images",
                                       flops=dict.fromkeys(["ours", *peers], flops)), ROUNDS)
    for name, result in results.items():
        for found, wanted in zip(result, results["plain"], strict=True):
            error = (found - wanted).float().norm() / wanted.float().norm()
            assert error < TOLERANCES[dtype], f"{name} is not plain attention: {error:.1e}"
