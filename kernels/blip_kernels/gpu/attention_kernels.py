"""Triton kernels of attention over segments: forward, and a backward of two kernels that write each gradient once.

Scheduling. A tile is a run of rows of one segment; `tiles_of` lists all tiles on the GPU, and programs behind the end
of the list return at once. One program does one tile of one head, tiles of a segment side by side so that they meet its
keys in the cache:

- 577 × 577 (image attention): five tiles a head and image in the forward, 64 images × 12 heads give 3,840 programs;
- many short texts: the rows of a tile follow from the mean length (`_config`), so that a text of 14 tokens takes a
  tile of 16 rows, and a thousand texts × 12 heads make 12,000 programs;
- few queries over long keys (an image's texts): programs are as few as query tiles × heads in the forward and in dq,
  but dk and dv are tiled over the keys. One step of generation, with even fewer queries, splits the keys as well: that
  is `decode_attention`.

Tiles of keys that every query row sees whole run in a loop without masks; what is left (the end of a segment, causal
diagonals) in a second loop that masks.

    s = scale · q kᵀ,  p = exp(s − lse),  out = dropout(p) v
    δ = Σ dout · out,  dp = dropout(dout vᵀ),  ds = p · (dp − δ),  dq = scale · ds k,  dk = scale · dsᵀ q,
    dv = dropout(p)ᵀ dout

Exponentials are powers of two: logits carry the factor log2(e), the log-sum-exp that is kept is base 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from blip_kernels.gpu.attention_backward import dkv_kernel, dq_kernel
from blip_kernels.gpu.attention_forward import forward_kernel
from blip_kernels.gpu.configs import config
from blip_kernels.gpu.exponentials import PACK
from blip_kernels.gpu.kernel_launch import generation, launch
from blip_kernels.gpu.tiles import tiles_of

LOG2E = 1.4426950408889634
SHORT_TILE = 16  # rows of the other side's tiles where segments are shorter than a whole tile


def forward(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool, dropout: float,
            scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Attention of packed segments: out as q, and the log-sum-exp base 2 of the logits, float32 [heads, query rows].

    Arguments as `blip_kernels.attention`; `seed` is the dropout's. Heads are 32, 64 or 128 wide.
    """
    q, k, v = map(_rows_in_place, (q, k, v))
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    chosen = _config("forward", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    descriptors = (None, None)
    if _packs(q, dropout, chosen) and len(k) > 0:
        k, v = map(_heads_in_place, (k, v))
        descriptors = (_descriptor(x, chosen["BLOCK_N"]) for x in (k, v))
    launch(forward_kernel, (len(tiles), heads), q, k, v, *descriptors, out, lse, tiles, q_offsets, kv_offsets, rows,
           *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], scale * LOG2E, seed,
           *_dropout_arguments(dropout), **_constants(q, causal, dropout), **chosen)
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor,
             kv_offsets: Tensor, causal: bool, dropout: float, scale: float,
             seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `forward`, contiguous."""
    q, k, v, grad = *map(_rows_in_place, (q, k, v)), grad.contiguous()
    rows, heads, head_dim = q.shape
    delta, dq = torch.empty_like(lse), torch.empty_like(out)
    dk, dv = (torch.empty((len(k), heads, head_dim), dtype=q.dtype, device=q.device) for _ in range(2))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    numbers = (scale * LOG2E, seed, *_dropout_arguments(dropout))
    constants = _constants(q, causal, dropout)

    chosen = _config("dq", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    launch(dq_kernel, (len(tiles), heads), q, k, v, out, grad, lse, delta, dq, tiles, q_offsets, kv_offsets, rows,
           *strides, *numbers, **constants, **chosen)

    chosen = _config("dk and dv", q, dropout, "BLOCK_N", len(k), kv_offsets)
    tiles = tiles_of(kv_offsets, len(k), chosen["BLOCK_N"])
    launch(dkv_kernel, (len(tiles), heads), q, k, v, grad, lse, delta, dk, dv, tiles, q_offsets, kv_offsets, rows,
           *strides, *dk.stride()[:2], *numbers, **constants, **chosen)
    return dq, dk, dv


def _rows_in_place(x: Tensor) -> Tensor:
    """x [rows, heads, head_dim] as it is where head_dim lies contiguous (slices of a fused projection), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _packs(q: Tensor, dropout: float, chosen: dict[str, int]) -> bool:
    """Whether whole tiles come by descriptors and weights by `gpu/exponentials.py`: where tensor cores outrun the MUFU,
    in tiles that give every thread enough weights."""
    whole = chosen["BLOCK_M"] * chosen["BLOCK_N"] // (32 * chosen["num_warps"]) >= PACK
    return generation(q.device) >= 100 and q.element_size() == 2 and dropout == 0 and whole


def _heads_in_place(x: Tensor) -> Tensor:
    """x [rows, heads, head_dim] as it is where a descriptor can address it: heads side by side, rows at multiples of 16
    bytes; else a copy."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if aligned and x.stride(1) == x.shape[2] else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of one head, of x [rows, heads, head_dim]."""
    count, heads, head_dim = x.shape
    return TensorDescriptor(x, [count, heads * head_dim], [x.stride(0), 1], [rows, head_dim])


def _config(name: str, q: Tensor, dropout: float, tiled: str, rows: int, offsets: Tensor) -> dict[str, int]:
    """The table's configuration, its tile `tiled` made to fit segments of the mean length: the smallest power of two
    that covers it, 16 at least.

    Each warp needs 16 rows of its own, or warps repeat each other's products; few warps hold small tiles only, and
    dropout's random words not even those: it keeps two warps.
    """
    width = "float32" if q.dtype == torch.float32 else "16 bit"
    launch_name = f"{name}, head_dim {q.shape[-1]}, {width}{', dropout' * (dropout > 0)}"
    chosen = config("attention", launch_name, generation(q.device))
    mean, full = rows / (len(offsets) - 1), chosen[tiled]
    while chosen[tiled] > 16 and chosen[tiled] // 2 >= mean:
        chosen[tiled] //= 2
    if chosen[tiled] < full:
        other = "BLOCK_N" if tiled == "BLOCK_M" else "BLOCK_M"
        chosen[other] = min(chosen[other], SHORT_TILE)
        chosen["num_warps"] = min(chosen["num_warps"], max(chosen[tiled] // 16, 2 if dropout else 1))
    return chosen


def _constants(q: Tensor, causal: bool, dropout: float) -> dict[str, object]:
    # float32 products keep float32's accuracy: TF32 in three passes.
    return {"D": q.shape[-1], "CAUSAL": causal, "DROPOUT": dropout > 0,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32"}


def _dropout_arguments(dropout: float) -> tuple[int, float]:
    """The 16-bit threshold below which a weight is dropped, and the factor of those kept."""
    threshold = round(dropout * 65536)
    return threshold, 65536 / (65536 - threshold)


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of launches for ahead-of-time compilation, on `meta` tensors: 64 segments, 12 heads."""
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def passes(name: str, length: int, head_dim: int, causal: bool,
               dropout: float) -> Iterator[tuple[str, Callable[[], object]]]:
        q, k, v, out, grad = (empty(64 * length, 12, head_dim) for _ in range(5))
        offsets, lse = empty(65, dtype=torch.int32), empty(12, 64 * length, dtype=torch.float32)
        options = (offsets, offsets, causal, dropout, head_dim**-0.5, 1)
        yield f"forward, {name}", partial(forward, q, k, v, *options)
        yield f"backward, {name}", partial(backward, grad, q, k, v, out, lse, *options)

    for head_dim in (32, 64, 128):
        for causal, dropout in ((False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)):
            name = f"head_dim {head_dim}{', causal' * causal}{', dropout' * (dropout > 0)}"
            yield from passes(name, 577, head_dim, causal, dropout)
    for length in (16, 32, 64):  # short texts take smaller tiles
        yield from passes(f"head_dim 64, {length} tokens", length, 64, False, 0.0)
        yield from passes(f"head_dim 64, {length} tokens, causal, dropout", length, 64, True, 0.1)
