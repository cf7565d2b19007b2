"""Hard negatives: one key per row, drawn from the softmax of the similarities while the keys stream by.

    P(row i draws key j) ∝ softmax_j(queries_i · keys / τ) + ε   over the admissible keys; softmax over all

BLIP section 3.2, ITM: in pre-training ε = 1e-4 and a row's own pair is excluded; in fine-tuning ε = 0 and
every key of the row's id is excluded.

It takes one pass and no weights of size rows × keys. The distribution is a mixture. With S the softmax's sum
over the n admissible keys, a row draws from the softmax alone with probability S / (S + ε n), otherwise
uniformly. Both components are drawn during the pass, from one random number v per row and key (Philox, so the
draw depends on neither tiles nor device): argmax of s/τ − log(−log(1 − v)) is a draw from the softmax
(Gumbel-max), argmin of v a uniform one. They need not be independent of each other, because only one of them
is used. A separate random number chooses which one after the pass, when S is known.

Random numbers: v of row i and key j is word j mod 4 of the counter (⌊j/4⌋, i, stream, 0); the choice of the
component is word 0 of the counter (2³² − 1, i, stream, 0). 31 bits of each word are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip_kernels.constants import NO_ID
from blip_kernels.features import check_features, check_ids, check_own_keys, feature_backend
from blip_kernels.random import new_seed, philox

SLICE_ELEMENTS = 1 << 17  # similarities per slice of the eager twin; the generator needs 64-bit integers
LAST_COUNTER, LEAST = (1 << 32) - 1, (1 << 31) - 2


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """31-bit numbers → (0, 1)."""
    return ((words.to(dtype) + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)


def _words(seed: int, stream: int, rows: int, keys: range, device: torch.device) -> Tensor:
    """31 random bits for each row and key, int64 [rows, keys]; `keys` must start at a multiple of 4."""
    counters = torch.arange(keys.start // 4, -(-keys.stop // 4), device=device)
    words = philox(seed, counters, torch.arange(rows, device=device)[:, None],
                   torch.tensor(stream, device=device))
    return (torch.stack(words, dim=2).flatten(1)[:, : len(keys)] >> 1).clamp_(max=LEAST)


def _reference(q: Tensor, keys: Tensor, temperature: Tensor, floor: float, seed: int, stream: int,
               ids: Tensor | None, key_ids: Tensor | None, first_own: int) -> Tensor:
    rows, wide, device = len(q), torch.promote_types(q.dtype, torch.float32), q.device
    q = q.to(wide) / temperature.to(wide)
    top, best = q.new_full((2, rows), float("-inf"))
    total, admitted, count = q.new_zeros(3, rows)
    drawn, even = torch.full((2, rows), -1, device=device)
    least = torch.full((rows,), LEAST + 1, device=device)
    step = max(SLICE_ELEMENTS // max(rows, 1) // 4 * 4, 4)
    for first in range(0, len(keys), step):
        part = range(first, min(first + step, len(keys)))
        place = slice(part.start, part.stop)
        logits = q @ keys[place].to(wide).T
        admissible = _admissible(part, rows, device, ids, None if key_ids is None else key_ids[place],
                                 first_own)
        new_top = torch.maximum(top, logits.amax(1))
        shrink, weights = (top - new_top).exp_(), (logits - new_top[:, None]).exp_()
        total = total * shrink + weights.sum(1)
        admitted = admitted * shrink + weights.masked_fill_(~admissible, 0.0).sum(1)
        count, top = count + admissible.sum(1), new_top

        words = _words(seed, stream, rows, part, device)
        scores = logits - (-torch.log1p(-_uniform(words, wide))).log_()
        value, index = scores.masked_fill_(~admissible, float("-inf")).max(1)
        drawn, best = torch.where(value > best, index + first, drawn), torch.maximum(best, value)
        value, index = words.masked_fill_(~admissible, LEAST + 1).min(1)
        even, least = torch.where(value < least, index + first, even), torch.minimum(least, value)
    choice = philox(seed, torch.full((rows,), LAST_COUNTER, device=device), torch.arange(rows, device=device),
                    torch.tensor(stream, device=device))[0]
    share = admitted / total
    by_softmax = _uniform((choice >> 1).clamp_(max=LEAST), wide) * (share + floor * count) <= share
    return torch.where(by_softmax & (drawn >= 0), drawn, even)


def _admissible(keys: range, rows: int, device: torch.device, ids: Tensor | None, key_ids: Tensor | None,
                first_own: int) -> Tensor:
    """Which keys a row may draw, bool [rows, keys]: not its own key, or not the keys of its id."""
    if ids is not None and key_ids is not None:
        return (ids[:, None] != key_ids[None, :]) | (ids == NO_ID)[:, None]
    own = torch.arange(first_own, first_own + rows, device=device)
    return own[:, None] != torch.arange(keys.start, keys.stop, device=device)


@torch.library.custom_op("blip_kernels::hard_negatives", mutates_args=())
def _hard_negatives(q: Tensor, keys: Tensor, temperature: Tensor, floor: float, seed: int, stream: int,
                    ids: Tensor | None, key_ids: Tensor | None, first_own: int, backend: str) -> Tensor:
    inputs = (q, keys, temperature, floor, seed, stream, ids, key_ids, first_own)
    if backend == "triton":
        from blip_kernels.gpu.hard_negative_kernels import draw

        return draw(*inputs)
    with torch.autocast(q.device.type, enabled=False):
        return _reference(*inputs)


@_hard_negatives.register_fake
def _(q, keys, temperature, floor, seed, stream, ids, key_ids, first_own, backend):
    return q.new_empty(q.shape[0], dtype=torch.int64)


@torch.no_grad()
def hard_negatives(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    *,
    floor: float = 0.0,
    seed: int | None = None,
    stream: int = 0,
    first_own_key: int = 0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw a negative key per row, with probability ∝ softmax(queries keysᵀ / τ) + floor over admissible keys.

    Not admissible is row i's own key, `first_own_key` + i, or, with `ids`, every key of the row's id (id −100
    equals nothing). The softmax runs over all keys, admissible or not. A row with no admissible key gets −1;
    a row with NaN similarities draws uniformly. There are no gradients.

    With `floor` 0 the draw is made in logarithms, so it follows the softmax even if all admissible weights
    underflow.

    Args:
        queries: [rows, width], float32, bfloat16 or float16 (the twin takes float64 as well).
        keys: [keys, width], same dtype and device; this rank's batch, or gathered from all ranks.
        temperature: τ > 0, one element of any floating dtype.
        floor: ε ≥ 0.
        seed: 0 to 2⁶³ − 1; by default drawn from PyTorch's default CPU generator. The same seed draws the
            same keys on every device (except ties within rounding). Give different ranks different seeds.
        stream: 0 to 2³¹ − 1, distinguishes independent draws under one seed (the two directions).
        first_own_key: the key of row 0; the keys of the other rows follow. Only without `ids`.
        ids: int64 [rows], or None to exclude pairs.
        key_ids: int64 [keys]; `ids` unless given.
        backend: auto, triton or reference (`blip_kernels.backends.op_backend`). The kernels take widths up to
            256; auto takes the twin for wider features.

    Returns:
        int64 [rows], indices of keys, or −1.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names the argument.
    """
    check_features(queries, temperature, keys=keys)
    check_own_keys(len(queries), len(keys), first_own_key, paired=ids is None)
    if ids is not None:
        key_ids = ids if key_ids is None else key_ids
        check_ids(queries, ids=(ids, len(queries)), key_ids=(key_ids, len(keys)))
    elif key_ids is not None:
        raise ValueError("key_ids need ids: without them a row's own key is excluded")
    seed = new_seed() if seed is None else seed
    if floor < 0.0 or not 0 <= seed < 1 << 63 or not 0 <= stream < 1 << 31:
        raise ValueError(f"floor must be at least 0, seed lie in 0 … 2⁶³ − 1, stream in 0 … 2³¹ − 1; got {floor}, "
                         f"{seed} and {stream}")
    return _hard_negatives(queries.contiguous(), keys.contiguous(), temperature, float(floor), seed, stream,
                           ids, key_ids, first_own_key, feature_backend(queries, backend))
