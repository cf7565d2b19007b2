"""What ranks exchange in a step. With one rank (or none initialised) each function returns its own input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from blip_fast.packing import PackedTexts


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Every rank's `x` [rows, …], in rank order, without gradients. All ranks give the same shape."""
    if world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = world()[0] * ctx.rows
        return grad[start : start + ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`; each rank's rows receive the gradients that all ranks computed for them, summed."""
    return x if world()[1] == 1 else _GatherWithGradient.apply(x)


def gather_texts(texts: PackedTexts) -> PackedTexts:
    """Every rank's texts, in rank order. All ranks give the same number of texts."""
    if world()[1] == 1:
        return texts
    longest = texts.lengths.max()
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = texts.token_ids.new_full((len(texts), int(longest)), 0)
    held = torch.arange(int(longest), device=padded.device) < texts.lengths[:, None]
    padded[held] = texts.token_ids
    padded, held = gather(padded), gather(held)
    offsets = torch.nn.functional.pad(held.sum(dim=1).cumsum(0), (1, 0)).int()
    return PackedTexts(padded[held], offsets)
