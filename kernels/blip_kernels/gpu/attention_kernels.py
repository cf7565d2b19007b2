"""Triton kernels of attention over segments: forward, and two of backward that write each gradient once.

Scheduling. A tile is a run of rows of one segment. `tiles_of` lists all tiles on the GPU, and programs past
the end of the list return at once. One program computes one tile of one head. Tiles of a segment are
neighbours in the grid, so that they find its keys in the cache:

- 577 × 577 (image attention): five tiles per head and image in the forward; 64 images × 12 heads give 3,840
  programs;
- many short texts: the rows of a tile follow from the mean length (`_config`). A text of 14 tokens takes a
  tile of 16 rows, and a thousand texts × 12 heads make 12,000 programs;
- few queries over long keys (an image's texts): the forward and dq have only query tiles × heads programs,
  but dk and dv are tiled over the keys. One step of generation has even fewer queries and splits the keys as
  well: that is `decode_attention`.

Tiles of keys that every query row sees completely run in a loop without masks. The rest (the end of a
segment, causal diagonals) runs in a second loop with masks.

    s = scale · q kᵀ,  p = exp(s − lse),  out = dropout(p) v
    δ = Σ dout · out,  dp = dropout(dout vᵀ),  ds = p · (dp − δ),  dq = scale · ds k,  dk = scale · dsᵀ q,
    dv = dropout(p)ᵀ dout

Exponentials are powers of two: logits carry the factor log2(e), and the stored log-sum-exp is base 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from blip_kernels.constants import DROPOUT_STEPS
from blip_kernels.gpu.attention_backward import dkv_kernel, dq_kernel
from blip_kernels.gpu.attention_forward import forward_kernel
from blip_kernels.gpu.configs import config
from blip_kernels.gpu.exponentials import PACK
from blip_kernels.gpu.kernel_launch import generation, launch, strides
from blip_kernels.gpu.streaming import LOG2E, precision
from blip_kernels.gpu.tiles import tiles_of

SHORT_TILE = 16  # rows of the other side's tiles if segments are shorter than a whole tile


def forward(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
            dropout: float, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Compute attention of packed segments.

    Arguments as `blip_kernels.attention`; `seed` is that of dropout. Heads are 32, 64 or 128 wide. Returns
    out, as q, and the base-2 log-sum-exp of the logits, float32 [heads, query rows].
    """
    q, k, v = map(_rows_in_place, (q, k, v))
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    chosen = _config("forward", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    tiles_k = tiles_v = None
    if _packs(q, dropout, chosen) and len(k) > 0:
        k, v = map(_heads_in_place, (k, v))
        tiles_k, tiles_v = (_descriptor(x, chosen["BLOCK_N"]) for x in (k, v))
    launch(forward_kernel, (len(tiles), heads), p_q=q, p_k=k, p_v=v, tiles_k=tiles_k, tiles_v=tiles_v,
           p_out=out, p_lse=lse, p_tiles=tiles, p_q_offsets=q_offsets, p_kv_offsets=kv_offsets, n_rows=rows,
           **strides(q=q, k=k, v=v, o=out), **_options(q, causal, dropout, scale, seed), **chosen)
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor,
             kv_offsets: Tensor, causal: bool, dropout: float, scale: float,
             seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of `forward`, contiguous."""
    q, k, v, grad = *map(_rows_in_place, (q, k, v)), grad.contiguous()
    rows, heads, head_dim = q.shape
    delta, dq = torch.empty_like(lse), torch.empty_like(out)
    dk, dv = (torch.empty((len(k), heads, head_dim), dtype=q.dtype, device=q.device) for _ in range(2))
    inputs = {"p_q": q, "p_k": k, "p_v": v, "p_do": grad, "p_lse": lse, "p_delta": delta,
              "p_q_offsets": q_offsets, "p_kv_offsets": kv_offsets, "n_rows": rows,
              **strides(q=q, k=k, v=v, o=out)}
    options = _options(q, causal, dropout, scale, seed)

    chosen = _config("dq", q, dropout, "BLOCK_M", rows, q_offsets)
    tiles = tiles_of(q_offsets, rows, chosen["BLOCK_M"])
    launch(dq_kernel, (len(tiles), heads), **inputs, p_out=out, p_dq=dq, p_tiles=tiles, **options, **chosen)

    chosen = _config("dk and dv", q, dropout, "BLOCK_N", len(k), kv_offsets)
    tiles = tiles_of(kv_offsets, len(k), chosen["BLOCK_N"])
    launch(dkv_kernel, (len(tiles), heads), **inputs, p_dk=dk, p_dv=dv, p_tiles=tiles, **strides(dk=dk),
           **options, **chosen)
    return dq, dk, dv


def _rows_in_place(x: Tensor) -> Tensor:
    """Return x [rows, heads, head_dim] itself if head_dim is contiguous (fused projections), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _packs(q: Tensor, dropout: float, chosen: dict[str, int]) -> bool:
    """Whether descriptors load whole tiles and `gpu/exponentials.py` computes the weights.

    True for 16-bit inputs without dropout if tensor cores outrun the MUFU and a tile gives every thread `PACK`
    weights or more.
    """
    whole = chosen["BLOCK_M"] * chosen["BLOCK_N"] // (32 * chosen["num_warps"]) >= PACK
    return generation(q.device) >= 100 and q.element_size() == 2 and dropout == 0 and whole


def _heads_in_place(x: Tensor) -> Tensor:
    """Return x [rows, heads, head_dim] itself if a descriptor can address it, else a copy.

    A descriptor needs the heads of a row next to one another, and rows at multiples of 16 bytes.
    """
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if aligned and x.stride(1) == x.shape[2] else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor that loads tiles of `rows` rows of one head of x [rows, heads, head_dim]."""
    count, heads, head_dim = x.shape
    return TensorDescriptor(x, [count, heads * head_dim], [x.stride(0), 1], [rows, head_dim])


def _config(name: str, q: Tensor, dropout: float, tiled: str, rows: int, offsets: Tensor) -> dict[str, int]:
    """Return the table's configuration, with its tile `tiled` reduced to the mean length of the segments.

    The tile becomes the smallest power of two that covers the mean length, but at least 16. Each warp needs
    16 rows of its own, otherwise warps repeat each other's products. Few warps hold small tiles only, and one
    warp does not hold dropout's random words as well: dropout keeps two warps.
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


def _options(q: Tensor, causal: bool, dropout: float, scale: float, seed: int) -> dict[str, object]:
    """Return the scalars and constexprs that all three kernels take.

    `threshold`: 16 random bits below it drop a weight; `keep_scale`: factor of the other weights.
    """
    threshold = round(dropout * DROPOUT_STEPS)
    return {"scale": scale * LOG2E, "seed": seed, "threshold": threshold,
            "keep_scale": DROPOUT_STEPS / (DROPOUT_STEPS - threshold), "D": q.shape[-1], "CAUSAL": causal,
            "DROPOUT": dropout > 0, "PRECISION": precision(q.dtype)}


def samples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, call) of launches to compile ahead of time, on `meta` tensors: 64 segments, 12 heads."""
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
