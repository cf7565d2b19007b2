"""Philox 4×32, the counter-based generator that kernels and their eager twins share.

The same counter gives the same bits in any order, tiling or device (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011). A kernel that recomputes a random choice in its backward needs only the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush; `tl.philox` gets the same number
_KEYS, _FACTORS, _WORD = (0x9E3779B9, 0xBB67AE85), (0xD2511F53, 0xCD9E8D57), 0xFFFFFFFF


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per counter (c0, c1, c2, 0), as `tl.philox(seed, c0, c1, c2, 0, ROUNDS)`.

    Args:
        seed: 0 to 2⁶³ − 1, the key.
        c0, c1, c2: int64, values below 2³², broadcast against one another.

    Returns:
        Four int64 tensors of the common shape, values 0 to 2³² − 1.
    """
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(ROUNDS):
        (high_a, low_a), (high_b, low_b) = _multiply(_FACTORS[0], c0), _multiply(_FACTORS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of factor · x: 32-bit values in int64, whose product needs 64 unsigned bits."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def new_seed() -> int:
    """Draw a seed from PyTorch's CPU generator, which needs no GPU; `torch.manual_seed` sets it."""
    return int(torch.randint(2**62, ()))
