"""Kernels over packed segments. This package knows tensors and nothing of BLIP."""

from blip_kernels.attention import attention
from blip_kernels.contrastive import contrastive
from blip_kernels.decode_attention import cached_attention, decode_attention
from blip_kernels.hard_negatives import hard_negatives
from blip_kernels.linear import linear
from blip_kernels.linear_cross_entropy import linear_cross_entropy
from blip_kernels.packed_linear import (
    PackedWeight,
    pack_weight,
    packed_linear,
    packing_cannot,
    row_blocks,
    sums_depend_on_rows,
)

__all__ = ["PackedWeight", "attention", "cached_attention", "contrastive", "decode_attention", "hard_negatives", "linear",
           "linear_cross_entropy", "pack_weight", "packed_linear", "packing_cannot", "row_blocks",
           "sums_depend_on_rows"]
