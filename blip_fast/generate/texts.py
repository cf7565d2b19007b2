"""What both searches share: the unfinished texts of all slots, each slot at its own length, and their
scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from blip_fast.generate.generation_config import GenerationConfig


@dataclass(frozen=True)
class Texts:
    """The texts of each slot: `each` texts of one length. After its end a text holds its first token."""

    token_ids: Tensor  # int64 [slots, each, max_length]
    lengths: Tensor  # int64 [slots]
    prompt_lengths: Tensor  # int64 [slots]
    parents: Tensor  # int64 [slots, each]: which of the slot's texts, a token shorter, each one continues
    sums: Tensor  # float32 [slots, each]: Σ log p of the generated tokens
    done: Tensor  # bool [slots]


State = TypeVar("State", bound=Texts)


def no_texts(slots: int, config: GenerationConfig, device: torch.device) -> dict[str, Tensor]:
    """The fields of `Texts` for slots that no image has entered."""
    each = config.texts_per_image
    return {
        "token_ids": torch.zeros(slots, each, config.max_length, dtype=torch.int64, device=device),
        "lengths": torch.ones(slots, dtype=torch.int64, device=device),
        "prompt_lengths": torch.zeros(slots, dtype=torch.int64, device=device),
        "parents": torch.arange(each, device=device).repeat(slots, 1),
        "sums": torch.zeros(slots, each, device=device),
        "done": torch.ones(slots, dtype=torch.bool, device=device),
    }


def enter(texts: Texts, slot: int, prompt: Sequence[int]) -> None:
    """Restart all texts of a slot with a prompt."""
    texts.token_ids[slot] = prompt[0]
    texts.token_ids[slot, :, : len(prompt)] = torch.tensor(prompt, device=texts.token_ids.device)
    texts.lengths[slot] = texts.prompt_lengths[slot] = len(prompt)
    texts.sums[slot], texts.done[slot] = 0.0, False


def only_where(slots: Tensor, new: State, old: State) -> State:
    """`new` in the given slots (bool [slots]), `old` in the others."""
    return type(old)(*(torch.where(slots.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in
                       ((getattr(new, field.name), getattr(old, field.name)) for field in fields(old))))


def narrow(texts: State, slots: Tensor) -> State:
    """Only the given slots (int64 [n])."""
    return type(texts)(*(getattr(texts, field.name)[slots] for field in fields(texts)))


def extend(texts: State, empty: State) -> State:
    """The slots of both, one after the other."""
    return type(texts)(*(torch.cat([getattr(texts, field.name), getattr(empty, field.name)])
                         for field in fields(texts)))


def adjust(scores: Tensor, texts: Texts, config: GenerationConfig, sep_id: int) -> Tensor:
    """Scores [slots, each, vocab_size] of the texts' next tokens: repeated tokens made less likely (negative
    scores times `repetition_penalty`, positive ones divided by it), [SEP] impossible before `min_length`, and
    so any token that would complete a banned sequence. May write into `scores`."""
    if config.repetition_penalty != 1.0:
        seen = scores.gather(2, texts.token_ids)
        seen = torch.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
        scores = scores.scatter(2, texts.token_ids, seen)
    if config.min_length:
        scores[:, :, sep_id].masked_fill_((texts.lengths < config.min_length)[:, None], -torch.inf)
    if config.banned:
        _ban(scores, texts, config.banned)
    return scores


def _ban(scores: Tensor, texts: Texts, banned: Sequence[Sequence[int]]) -> None:
    """−∞ for the last token of each banned sequence whose other tokens end a text."""
    longest, device = max(map(len, banned)) - 1, scores.device
    # The sequences' beginnings and the texts' ends, right-aligned; −1 fits anything, −2 nothing.
    begins = torch.tensor([[-1] * (longest - len(s) + 1) + list(s[:-1]) for s in banned], device=device)
    place = texts.lengths[:, None] + torch.arange(-longest, 0, device=device)
    ends = texts.token_ids.take_along_dim(place.clamp(min=0)[:, None],
                                          2).masked_fill((place < 0)[:, None], -2)
    fits = ((ends[:, :, None] == begins) | (begins == -1)).all(-1)  # [slots, each, banned]
    slot, text, sequence = fits.nonzero(as_tuple=True)
    scores[slot, text, torch.tensor([s[-1] for s in banned], device=device)[sequence]] = -torch.inf
