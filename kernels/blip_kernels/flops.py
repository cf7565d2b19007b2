"""The FLOPs of each op for `torch.utils.flop_counter`: matrix products only, two per multiply-add.

Importing this module registers the counts. Attention counts the pairs of query and key that see each other,
without padding; backward passes include what they recompute. PyTorch counts the backends that are not our ops
(`sdpa`, `sliced`, `flash_attn`, `xformers`) with padding or not at all, so count with
`BLIP_FAST_ATTENTION=reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import blip_kernels  # noqa: F401 (its ops are registered when it is imported)

_ops = torch.ops.blip_kernels


def _pairs(q_offsets: Tensor, kv_offsets: Tensor, causal: bool) -> int:
    """Count the pairs of query and key that see each other."""
    n_q, n_kv = q_offsets.diff().long(), kv_offsets.diff().long()
    if not causal:
        return int((n_q * n_kv).sum())
    # The last query sees all n_kv keys, each earlier one a key less: a triangle, cut off where no keys are
    # left.
    seeing = torch.minimum(n_q, n_kv)
    return int((seeing * (2 * n_kv - seeing + 1) // 2).sum())


@register_flop_formula(_ops.attention, get_raw=True)
def _attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, causal: bool,
               *_: object, **__: object) -> int:
    return 2 * 2 * q.shape[1] * q.shape[2] * _pairs(q_offsets, kv_offsets, causal)  # q kᵀ; p v


@register_flop_formula(_ops.attention_backward, get_raw=True)
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                        q_offsets: Tensor, kv_offsets: Tensor, causal: bool, *_: object, **__: object) -> int:
    # q kᵀ and dout vᵀ for the weights; ds k; dsᵀ q; pᵀ dout
    return 5 * 2 * q.shape[1] * q.shape[2] * _pairs(q_offsets, kv_offsets, causal)


@register_flop_formula(_ops.decode_attention, get_raw=True)
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *_: object, **__: object) -> int:
    return 2 * 2 * len(q) // len(k) * q[0].numel() * int(lengths.sum())


@register_flop_formula(_ops.cached_attention, get_raw=True)
def _cached_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, *_: object,
                      **__: object) -> int:
    return 2 * 2 * q[0].numel() * int(lengths.sum())


@register_flop_formula(_ops.product, get_raw=True)
def _product(x: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    return 2 * x.numel() * len(weight)


@register_flop_formula(_ops.contrastive, get_raw=True)
def _contrastive(q: Tensor, q_m: Tensor, batch_keys: Tensor, queue_keys: Tensor, *_: object,
                 **__: object) -> int:
    return 2 * 2 * q.numel() * (len(batch_keys) + len(queue_keys))  # q and q_m


@register_flop_formula(_ops.contrastive_backward, get_raw=True)
def _contrastive_backward(grad: Tensor, stats: Tensor, q: Tensor, q_m: Tensor, batch_keys: Tensor,
                          queue_keys: Tensor, temperature: Tensor, alpha: float, ids: object,
                          item_ids: object, first_own: int, need_keys: bool, *_: object, **__: object) -> int:
    every = 3 * 2 * q.numel() * (len(batch_keys) + len(queue_keys))  # both recomputed, and dq
    return every + need_keys * 2 * q.numel() * len(batch_keys)


@register_flop_formula(_ops.hard_negatives, get_raw=True)
def _hard_negatives(q: Tensor, keys: Tensor, *_: object, **__: object) -> int:
    return 2 * q.numel() * len(keys)


@register_flop_formula(_ops.linear_cross_entropy, get_raw=True)
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    return 2 * hidden.numel() * len(weight)


@register_flop_formula(_ops.linear_cross_entropy_backward, get_raw=True)
def _linear_cross_entropy_backward(d_losses: Tensor, hidden: Tensor, weight: Tensor, bias: object,
                                   targets: Tensor, chunk_lse: Tensor, kept: Tensor, smoothing: float,
                                   ignore_index: int, dtype: object, needs: Sequence[bool], *_: object,
                                   **__: object) -> int:
    # The logits again (except the chunks that the forward kept), d hidden, d weight.
    again = hidden.numel() * len(weight) - kept.numel() * hidden.shape[1]
    return 2 * (again + (needs[0] + needs[1]) * hidden.numel() * len(weight))
