"""The continuous batch: slots of images at different lengths that pass the decoder together, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blip_fast.generate.beam import BeamSearch
from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.generate.sample import Sampling
from blip_fast.generate.texts import extend, narrow, only_where
from blip_fast.model.blip import BlipModel
from blip_fast.model.kv_cache import PromptRows, SelfCache, image_pool


class ContinuousBatch:
    """An image enters a free slot and leaves it when its texts are finished, whatever the other slots do.

    Every step computes one token of each text of each slot, so all shapes stay as they are; what free slots compute is
    not used. A prompt's last token is the first that all texts of a slot compute; those before it are computed once, as
    rows of the same step.
    """

    def __init__(self, model: BlipModel, config: GenerationConfig, slots: int, keys: int, like: Tensor) -> None:
        """`slots` images of up to `keys` states, which are of the dtype and on the device of `like`."""
        self.model, self.keys, self.slots, stack = model, keys, slots, model.stack("decoder")
        self.each = config.texts_per_image
        self.search = (Sampling if config.top_p is not None or config.beams == 1 else BeamSearch)(
            config, model.config.tokens.sep)
        self.texts = self.search.empty(slots, like.device)
        self.images = image_pool(stack.config, stack.image_to_kv[0], slots, keys, self.each * config.max_length, like)
        self.cache = SelfCache(stack.config, slots, self.each, config.max_length, like)
        self.prompts: dict[int, Sequence[int]] = {}  # of the requests that have entered since the last step
        self.places: list[int | None] = [None] * slots  # of the request in each slot

    @property
    def free(self) -> int:
        """How many images may enter."""
        return self.slots - len(self.places) + self.places.count(None)

    @property
    def idle(self) -> bool:
        return self.free == self.slots

    def enter(self, place: int, states: Tensor, prompt: Sequence[int], seed: int) -> None:
        """Put request number `place` into a free slot; states [keys, vision width] are copied."""
        if None not in self.places:
            self._grow()
        slot = self.places.index(None)
        self.places[slot] = place
        self.images.enter(slot, states)
        self.cache.enter(slot, len(prompt) - 1)
        self.prompts[place] = prompt
        self.search.enter(self.texts, slot, prompt, seed)  # type: ignore[arg-type]

    def step(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Compute a token of every text. Yields the requests that this finishes: place, token ids, scores (see the
        search's `results`)."""
        texts = self.texts
        positions = (texts.lengths - 1)[:, None].expand(-1, self.each)  # [slots, each]
        tokens = texts.token_ids.gather(2, positions[..., None])
        prompts = PromptRows.of({self.places.index(place): prompt for place, prompt in self.prompts.items()},
                                tokens.device)
        self.prompts.clear()
        hidden = self.model.stack("decoder").decode(tokens.flatten(), positions.flatten(), self.cache, self.images,
                                                    prompts)
        logits = self.model.vocabulary_logits(hidden)[: positions.numel()]
        full = texts.token_ids.shape[2]  # what is done may be, and has no room for what it goes on with
        ready = replace(texts, lengths=texts.lengths.clamp(max=full - 1))
        advanced = self.search.advance(ready, logits.view(*positions.shape, -1))  # type: ignore[arg-type]
        self.texts = only_where(~texts.done, advanced, texts)
        if isinstance(self.search, BeamSearch):
            self.cache.select(self.texts.parents, texts.lengths)
        for slot, done in enumerate(self.texts.done.tolist()):
            place = self.places[slot]
            if done and place is not None:
                self.places[slot] = None
                yield place, *self.search.results(self.texts, slot)  # type: ignore[arg-type]

    def leave(self, place: int) -> None:
        """Stop working on a request; nothing happens where it is done."""
        if place in self.places:
            self.places[self.places.index(place)] = None
            self.prompts.pop(place, None)

    def shrink(self) -> None:
        """Drop free slots once they are half of those that there are, or more: it costs a copy of the others. They
        come back when images enter."""
        taken = [slot for slot, place in enumerate(self.places) if place is not None]
        if 2 * len(taken) <= len(self.places):
            slots = torch.tensor(taken, device=self.texts.lengths.device)
            self.texts = narrow(self.texts, slots)
            self.images.keep(slots)
            self.cache.keep(slots)
            self.places = [self.places[slot] for slot in taken]

    def _grow(self) -> None:
        """Twice the slots, as many as were asked for at most: a copy of those that there are."""
        more = min(self.slots, 2 * len(self.places)) - len(self.places)
        self.texts = extend(self.texts, self.search.empty(more, self.texts.lengths.device))  # type: ignore[arg-type]
        self.images.add(more)
        self.cache.add(more)
        self.places += [None] * more
