"""Attention implementations side by side, forward and backward, at the sizes of small and base models (one process)."""

import pytest
import torch
from blip_kernels import attention

SIZES = {"small-37": (64, 37, 4, 32), "base-197": (4, 197, 12, 64)}  # images, tokens, heads, head width


@pytest.mark.parametrize("backend", ["sdpa", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(benchmark, size, dtype, backend):
    images, tokens, heads, head_dim = SIZES[size]
    benchmark.group = f"{size} {dtype}"
    torch.manual_seed(0)
    q, k, v = (torch.randn(images * tokens, heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    offsets = torch.arange(images + 1, dtype=torch.int32) * tokens

    def step() -> torch.Tensor:
        out = attention(q, k, v, offsets, offsets, backend=backend)
        return torch.autograd.grad(out.sum(), q)[0]

    gradient = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    assert gradient.shape == q.shape
