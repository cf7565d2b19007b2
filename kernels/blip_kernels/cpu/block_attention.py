"""Attention over segments by FlashAttention and xFormers, if installed. Both bring their own backward.

They need lengths on the host, so each call waits for the GPU once; `triton` does not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Adapter = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool, float, float], Tensor]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
                    dropout: float, scale: float) -> Tensor:
    """`flash_attn_varlen_func` (flash-attn 2.7); causal masks are aligned bottom right, like ours."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    longest_q, longest_kv = (int(offsets.diff().max()) for offsets in (q_offsets, kv_offsets))
    return flash_attn_varlen_func(q, k, v, q_offsets, kv_offsets, longest_q, longest_kv, dropout_p=dropout,
                                  softmax_scale=scale, causal=causal)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
                       dropout: float, scale: float) -> Tensor:
    """`memory_efficient_attention` over a block-diagonal mask (xFormers 0.0.30)."""
    from xformers.ops import fmha, memory_efficient_attention  # pyright: ignore[reportMissingImports]

    lengths = [offsets.diff().tolist() for offsets in (q_offsets, kv_offsets)]
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths)
    if causal:
        mask = mask.make_causal_from_bottomright()
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, p=dropout, scale=scale)[0]


ADAPTERS: dict[str, Adapter] = {"flash_attn": flash_attention, "xformers": xformers_attention}
