"""Kernels over packed segments. This package knows tensors and nothing of BLIP."""

from blip_kernels.attention import attention
from blip_kernels.contrastive import contrastive
from blip_kernels.cpu.absorbed_attention import absorbed_attention
from blip_kernels.cpu.packed_linear import (
    PackedWeight,
    pack_weight,
    packed_linear,
    packing_cannot,
    row_blocks,
    sums_depend_on_rows,
)
from blip_kernels.cpu.quantised_linear import QuantisedWeight, quantise_weight, quantised_linear
from blip_kernels.decode_attention import cached_attention, decode_attention
from blip_kernels.hard_negatives import hard_negatives
from blip_kernels.linear import linear
from blip_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "PackedWeight", "QuantisedWeight", "absorbed_attention", "attention", "cached_attention",
    "contrastive", "decode_attention", "hard_negatives", "linear", "linear_cross_entropy",
    "pack_weight", "packed_linear", "packing_cannot", "quantise_weight", "quantised_linear",
    "row_blocks", "sums_depend_on_rows",
]
