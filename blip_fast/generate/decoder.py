"""What every search shares: the decoder that goes on from where it stands, and the adjustment of scores."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from blip_fast.generate.config import GenerationConfig
from blip_fast.model import BlipModel
from blip_fast.text import ImageKV, SelfCache

State = TypeVar("State")


class Decoder:
    """A prompt once per image, then one token per row and step; all rows of an image read its keys and values."""

    def __init__(self, model: BlipModel, image_kv: ImageKV, config: GenerationConfig) -> None:
        self.model, self.stack, self.image_kv = model, model.stack("decoder"), image_kv
        images = len(image_kv.offsets) - 1
        self.cache = SelfCache(self.stack.config, images, images * config.beams, config.max_length, image_kv.kv[0])

    def prefill(self, prompts: Tensor) -> Tensor:
        """Prompts int64 [images, length] → next-token logits float32 [images, vocab_size]."""
        return self._next_logits(prompts)

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Go on from rows `parents` int64 [rows] with one token each, int64 [rows] → logits [rows, vocab_size].

        Rows are sorted by image, the same number for each.
        """
        self.cache.select(parents)
        return self._next_logits(tokens[:, None])

    def keep_images(self, images: Tensor) -> None:
        """Go on with these images alone; the next step's rows are theirs."""
        self.image_kv = self.image_kv.select(images)

    def _next_logits(self, token_ids: Tensor) -> Tensor:
        hidden = self.stack.decode(token_ids, self.cache, self.image_kv)
        return self.model.vocabulary_logits(hidden[:, -1]).float()


def adjust(scores: Tensor, token_ids: Tensor, config: GenerationConfig, sep_id: int) -> Tensor:
    """Scores [rows, vocab_size] after the texts token_ids [rows, length]: repeated tokens made less likely (negative
    scores times `repetition_penalty`, positive ones divided by it), [SEP] impossible before `min_length`, and so is
    what would end a banned sequence. May write into `scores`."""
    if config.repetition_penalty != 1.0:
        seen = scores.gather(1, token_ids)
        seen = torch.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
        scores = scores.scatter(1, token_ids, seen)
    if token_ids.shape[1] < config.min_length:
        scores = scores.index_fill(1, torch.tensor([sep_id], device=scores.device), -torch.inf)
    for *before, last in config.banned:
        tail = token_ids[:, token_ids.shape[1] - len(before) :]
        if len(before) <= token_ids.shape[1]:
            follows = (tail == torch.tensor(before, dtype=torch.int64, device=scores.device)).all(1)
            scores[follows, last] = -torch.inf
    return scores


def unfinished_if_few(done: Tensor) -> Tensor | None:
    """Which images go on, int64 [n], once they are half of all or fewer; None as long as it is not worth the copy of
    their keys and values."""
    going_on = (~done).nonzero().flatten()
    return going_on if 2 * len(going_on) <= len(done) else None


def narrow(state: State, images: Tensor) -> State:
    """A dataclass of tensors [images, …] → the same of the given images alone."""
    return type(state)(*(getattr(state, field.name)[images] for field in fields(state)))  # type: ignore[arg-type]
