"""What generation reads at every step, in slots of fixed shapes: keys and values of images, and of the texts
so far.

An image enters a slot when another has left it; nothing is copied per beam or from step to step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from blip_kernels import absorbed_attention, cached_attention, decode_attention, row_blocks
from blip_kernels.decode_attention import MOST_ROWS
from torch import Tensor, nn

from blip_fast.model.config import TextConfig

# An image's keys and values are not computed if its texts have up to this many times head_dim tokens
# (docs/decisions/cpu.md).
ABSORBED_TOKENS = 1.5


@dataclass(frozen=True)
class PromptRows:
    """The tokens of prompts, except each prompt's last one. A step computes them as rows of their own, after
    one row of each text, so that the whole prompt of an image that enters takes one step."""

    token_ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows], of the tokens in their prompts
    slots: Tensor  # int64 [rows]
    pieces: list[tuple[Tensor, int]]  # in the order of the rows: (ascending slots int64 [n], rows per slot)

    @classmethod
    def of(cls, prompts: Mapping[int, Sequence[int]], device: torch.device) -> PromptRows | None:
        """From each slot's prompt; None if no prompt has more than one token."""
        pieces: dict[range, list[int]] = defaultdict(list)  # slots by positions
        for slot, prompt in sorted(prompts.items()):
            for first in range(0, len(prompt) - 1, MOST_ROWS):
                pieces[range(first, min(first + MOST_ROWS, len(prompt) - 1))].append(slot)
        rows = [(prompts[slot][position], position, slot)
                for piece, slots in pieces.items() for slot in slots for position in piece]
        if not rows:
            return None
        token_ids, positions, in_slots = torch.tensor(rows, device=device).unbind(1)
        return cls(token_ids, positions, in_slots,
                   [(torch.tensor(slots, device=device), len(piece)) for piece, slots in pieces.items()])

    def split(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut x [rows, ...] into the pieces; yield each with its slots."""
        for (slots, _), part in zip(self.pieces, x.split([len(s) * rows for s, rows in self.pieces]),
                                    strict=True):
            yield part, slots


class KeyValuePool:
    """Cross-attention keys and values of images, in slots. An image that enters is projected into its slot
    once; all of its texts read it there.
    """

    def __init__(self, config: TextConfig, projection: nn.Module, slots: int, keys: int,
                 like: Tensor) -> None:
        """Room for `keys` states in each slot; `projection` takes states to keys and values of all layers."""
        # A head's keys lie together: batched products read them as they are (docs/decisions/generation.md).
        shape = (config.layers, 2, slots, config.heads, keys, config.width // config.heads)
        self.projection = projection
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=like.device)

    def enter(self, slot: int, states: Tensor) -> None:
        """Put an image's states [keys, vision width] into a slot, in place of what was there."""
        layers, parts, _, heads, _, head_dim = self.kv.shape
        with row_blocks(len(states), one_input=True):
            kv = self.projection(states).view(-1, layers, parts, heads, head_dim)
        self.kv[:, :, slot, :, : len(kv)] = kv.permute(1, 2, 3, 0, 4)
        self.kv[:, :, slot, :, len(kv) :] = 0  # read too, with a weight of zero
        self.lengths[slot] = len(kv)

    def attend(self, layer: int, q: Tensor, slots: Tensor | None = None) -> Tensor:
        """Attention of q [rows, heads, head_dim] to the image of each row's slot. Each slot, or each of
        `slots` (int64, ascending), has the same number of consecutive rows."""
        keys, values = (_of_slots(x, slots).transpose(1, 2) for x in self.kv[layer])
        return decode_attention(q, keys, values, _of_slots(self.lengths, slots))

    def keep(self, slots: Tensor) -> None:
        """Go on with the given slots alone (int64 [n])."""
        self.kv, self.lengths = self.kv.index_select(2, slots), self.lengths[slots]

    def add(self, slots: int) -> None:
        """Append this many empty slots."""
        layers, parts, _, *rest = self.kv.shape
        self.kv = torch.cat([self.kv, self.kv.new_zeros(layers, parts, slots, *rest)], dim=2)
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(slots)])


class StatesPool:
    """As `KeyValuePool`, but with the states themselves in the slots: `absorbed_attention` never computes
    their keys and values. It is for few tokens of few texts."""

    def __init__(self, config: TextConfig, projection: nn.Module, slots: int, keys: int,
                 like: Tensor) -> None:
        self.key_weight, self.value_weight, self.value_bias = _by_layer(projection, config)
        self.scale = (config.width // config.heads) ** -0.5
        self.states = torch.zeros(slots, keys, self.key_weight.shape[-1], dtype=like.dtype)
        self.lengths = torch.ones(slots, dtype=torch.int32)

    def enter(self, slot: int, states: Tensor) -> None:
        self.states[slot, : len(states)], self.states[slot, len(states) :] = states, 0
        self.lengths[slot] = len(states)

    def attend(self, layer: int, q: Tensor, slots: Tensor | None = None) -> Tensor:
        return absorbed_attention(q, _of_slots(self.states, slots), _of_slots(self.lengths, slots),
                                  self.key_weight[layer], self.value_weight[layer], self.value_bias[layer],
                                  self.scale)

    def keep(self, slots: Tensor) -> None:
        self.states, self.lengths = self.states.index_select(0, slots), self.lengths[slots]

    def add(self, slots: int) -> None:
        self.states = torch.cat([self.states, self.states.new_zeros(slots, *self.states.shape[1:])])
        self.lengths = torch.cat([self.lengths, self.lengths.new_ones(slots)])


def _of_slots(x: Tensor, slots: Tensor | None) -> Tensor:
    """The given slots of x [slots, ...]: a copy, unless they are all of them."""
    return x if slots is None or len(slots) == len(x) else x.index_select(0, slots)


def _by_layer(projection: nn.Module, config: TextConfig) -> tuple[Tensor, Tensor, Tensor]:
    """A projection's parameters as `absorbed_attention` takes them: weights of keys [layers, heads, head_dim,
    vision width] and of values [layers, heads, vision width, head_dim], biases of values [layers, heads,
    head_dim]."""
    if projection in _BY_LAYER:
        return _BY_LAYER[projection]
    dense = projection.state_dict()  # a packed layer gives its weight as it was
    weight, bias = dense["weight"], dense["bias"]
    parts = weight.view(config.layers, 2, config.heads, -1, weight.shape[1])
    found = (parts[:, 0].contiguous(), parts[:, 1].transpose(2, 3).contiguous(),
             bias.view(config.layers, 2, config.heads, -1)[:, 1])
    # weights in training change
    if not any(parameter.requires_grad for parameter in projection.parameters()):
        _BY_LAYER[projection] = found
    return found


_BY_LAYER: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()

ImagePool = KeyValuePool | StatesPool


def image_pool(config: TextConfig, projection: nn.Module, slots: int, keys: int, tokens: int,
               like: Tensor) -> ImagePool:
    """Slots for images whose texts will have up to `tokens` tokens altogether.

    Where keys and values are not computed, a token costs 1 / head_dim of an image's projection.
    """
    few = tokens <= ABSORBED_TOKENS * config.width // config.heads
    pool = StatesPool if few and like.device.type == "cpu" else KeyValuePool
    return pool(config, projection, slots, keys, like)


class SelfCache:
    """Self-attention keys and values of the tokens decoded so far, in entries that are written once and never
    moved.

    `table` [rows, max_tokens] says where each row's tokens lie. Beams share the entries of their common
    history, so reordering beams only changes the table. `each` consecutive rows belong to one slot. A row has
    `max_tokens` entries of its own, and its table names entries of its slot only.
    """

    def __init__(self, config: TextConfig, slots: int, each: int, max_tokens: int, like: Tensor) -> None:
        entries = slots * each * max_tokens
        shape = (config.layers, 2, entries, config.heads, config.width // config.heads)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.own = torch.arange(entries, device=like.device).view(slots, each, max_tokens)
        self.table = self.own.flatten(0, 1).clone()

    def enter(self, slot: int, shared: int) -> None:
        """Reset all rows of a slot: their first `shared` tokens will lie in the first row's entries."""
        rows = self.table.view(self.own.shape)[slot]
        rows.copy_(self.own[slot])
        rows[:, :shared] = self.own[slot, 0, :shared]

    def place(self, positions: Tensor, prompts: PromptRows | None = None) -> None:
        """Prepare a step: the next token of each row has `positions` [rows] in its text, and the rows of
        `prompts` follow. `append` then stores their keys and values layer by layer."""
        self._read_table = self.table
        if prompts is not None:
            positions = torch.cat([positions, prompts.positions])
            self._read_table = torch.cat([self.table, self.table[prompts.slots * self.own.shape[1]]])
        self._write_entries = self._read_table.gather(1, positions[:, None]).squeeze(1)
        self._lengths = (positions + 1).int()

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v [rows, heads, head_dim]."""
        for cache, new in zip(self.kv[layer], (k, v), strict=True):
            cache.index_copy_(0, self._write_entries, new)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q [rows, heads, head_dim], one token per row, to the row's tokens up to it, read where
        they lie."""
        keys, values = self.kv[layer]
        return cached_attention(q, keys, values, self._read_table, self._lengths)

    def select(self, parents: Tensor, lengths: Tensor) -> None:
        """Make each row continue row `parents` [slots, each] of its slot, which has `lengths` [slots]
        tokens."""
        table = self.table.view(self.own.shape)
        # Later tokens go into the row's own entries: no other row reads those from this length on.
        shared = torch.arange(self.own.shape[2], device=lengths.device) < lengths[:, None, None]
        table = torch.where(shared, table.take_along_dim(parents[..., None], 1), self.own)
        self.table = table.flatten(0, 1)

    def keep(self, slots: Tensor) -> None:
        """Go on with the given slots alone (int64 [n])."""
        entries = self.own[slots].flatten()
        table = self.table.view(self.own.shape)[slots]
        self.own = self.own[: len(slots)]
        shift = self.own[:, 0, 0] - entries.view(self.own.shape)[:, 0, 0]
        self.table = (table + shift[:, None, None]).flatten(0, 1)
        self.kv = self.kv.index_select(2, entries)

    def add(self, slots: int) -> None:
        """Append this many empty slots. The entries of the others stay where they are."""
        before, each, max_tokens = self.own.shape
        entries = slots * each * max_tokens
        layers, parts, _, *rest = self.kv.shape
        self.kv = torch.cat([self.kv, self.kv.new_zeros(layers, parts, entries, *rest)], dim=2)
        self.own = torch.arange(self.kv.shape[2],
                                device=self.own.device).view(before + slots, each, max_tokens)
        self.table = torch.cat([self.table, self.own[before:].flatten(0, 1)])
