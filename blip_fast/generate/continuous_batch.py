"""The continuous batch: requests at different lengths that pass the decoder together, in slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from blip_kernels.decode_attention import MOST_ROWS
from torch import Tensor

from blip_fast.generate.beam import BeamSearch
from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.generate.sample import Sampling
from blip_fast.generate.texts import extend, narrow, only_where
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageStates
from blip_fast.model.kv_cache import PromptRows, SelfCache, image_pool

QUESTION_KEYS = 64  # slots for encoded questions have a multiple of this many keys


@dataclass(frozen=True)
class Generated:
    """A generated text.

    `token_ids` is all of it, as transformers' `generate` returns it: [DEC] and the prompt, then what was
    generated, with [SEP] at the end unless it is `cut`: `max_length` ended it before it had come to its end.
    `score` follows the config's beam rule; without beams it is the same formula over the model's own
    probabilities (before penalties, temperature and nucleus).
    """

    token_ids: list[int]
    score: float
    cut: bool


@dataclass(frozen=True)
class Request:
    """An image, or an encoded question, of which texts are wanted."""

    states: ImageStates  # of one image: `image_states(image_embeds)` or `model.question_states(...)`
    prompt: Sequence[int]  # [DEC] first, without [SEP]; a forced beginning of the text is a longer prompt
    seed: int = 0  # of sampling


class Generation:
    """Texts that are being written: requests enter one by one, and each leaves when its texts are finished.

    A text depends on its request and the config alone, never on `slots`, on its place or on other requests.

    A request enters a free slot. Every step computes one token of each text of each slot, so shapes stay the
    same; what free slots compute is not used. A prompt's last token is the first that all texts of a slot
    compute. The tokens before it are computed once, as further rows of the same step.
    """

    def __init__(self, model: BlipModel, config: GenerationConfig, slots: int) -> None:
        """`slots` requests at a time. Raises ValueError as `generate_stream`."""
        if model.training:
            raise ValueError("the model is in training mode, dropout would change the texts: call "
                             "model.eval() first")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        _check_config(model, config)
        self.model, self.config, self.slots = model, config, slots
        self._search = (Sampling if config.top_p is not None or config.beams == 1 else BeamSearch)(
            config, model.config.tokens.sep)
        self._prompts: dict[int, Sequence[int]] = {}  # of the requests that are in, by place
        self._entered: list[int] = []  # places of those that have entered since the last step
        self._places: list[int | None] = []  # of the request in each slot
        self._keys: int | None = None  # room of each slot; None before the first request

    @property
    def free(self) -> int:
        """How many requests may enter, if they need the room that the others have."""
        return self.slots - len(self._prompts)

    @property
    def idle(self) -> bool:
        return not self._prompts

    @torch.inference_mode()
    def enter(self, place: int, request: Request) -> bool:
        """Begin request number `place`; its states are copied.

        Returns False if it has to wait: no slot is free, or it needs other room than those that are in (other
        room would change the bits of their texts). Raises ValueError for its prompt as `generate_stream`.
        """
        _check_prompt(request.prompt, self.config)
        states, keys = request.states.rows, _room(self.model, request.states)
        if self.idle and keys != self._keys:
            self._make_slots(keys, states)
        if keys != self._keys or not self.free:
            return False
        if None not in self._places:
            self._grow()
        slot = self._places.index(None)
        self._places[slot] = place
        self._images.enter(slot, states)
        self._cache.enter(slot, len(request.prompt) - 1)
        self._search.enter(self._texts, slot, request.prompt, request.seed)  # type: ignore[arg-type]
        self._prompts[place] = request.prompt
        self._entered.append(place)
        return True

    def leave(self, place: int) -> None:
        """Stop writing for a request; nothing happens if it is done, or never entered."""
        if self._prompts.pop(place, None) is not None:
            self._places[self._places.index(place)] = None
            self._entered = [entered for entered in self._entered if entered != place]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Generated]]]:
        """Compute a token of every text. Call it when all that may enter have done so: free slots may be
        dropped first.

        Returns the requests that this finishes: their numbers and texts.
        """
        if self.idle:
            return []
        self._shrink()
        logits = self._next_token_logits()
        before = self._texts
        # A finished text may fill its row; clamp, so that its discarded next token has a slot.
        ready = replace(before, lengths=before.lengths.clamp(max=self.config.max_length - 1))
        advanced = self._search.advance(ready, logits)  # type: ignore[arg-type]
        self._texts = only_where(~before.done, advanced, before)
        if isinstance(self._search, BeamSearch):
            self._cache.select(self._texts.parents, before.lengths)
        return [(place, self._take_out(slot, place)) for slot, (place, done)
                in enumerate(zip(self._places, self._texts.done.tolist(), strict=True))
                if done and place is not None]

    def _next_token_logits(self) -> Tensor:
        """float32 [slots, texts of each, vocab_size], from the last token of each text."""
        texts = self._texts
        positions = (texts.lengths - 1)[:, None].expand(-1, self.config.texts_per_image)
        tokens = texts.token_ids.gather(2, positions[..., None])
        prompts = PromptRows.of({self._places.index(place): self._prompts[place] for place in self._entered},
                                tokens.device)
        self._entered.clear()
        hidden = self.model.stack("decoder").decode(tokens.flatten(), positions.flatten(), self._cache,
                                                    self._images, prompts)
        return self.model.vocabulary_logits(hidden)[: positions.numel()].view(*positions.shape, -1)

    def _take_out(self, slot: int, place: int) -> list[Generated]:
        """Free the slot of a finished request. Texts go up to their [SEP]; one with a score of −∞ is none."""
        self._places[slot] = None
        prompt_length, sep_id = len(self._prompts.pop(place)), self.model.config.tokens.sep
        token_ids, scores = self._search.results(self._texts, slot)  # type: ignore[arg-type]
        texts = []
        for ids, score in zip(token_ids.tolist(), scores.tolist(), strict=True):
            if score > -torch.inf:
                cut = sep_id not in ids[prompt_length:]
                end = len(ids) if cut else ids.index(sep_id, prompt_length) + 1
                texts.append(Generated(ids[:end], score, cut))
        return texts

    def _make_slots(self, keys: int, like: Tensor) -> None:
        """All slots anew, with room for `keys` states of the dtype and on the device of `like`."""
        stack, config = self.model.stack("decoder"), self.config
        each = config.texts_per_image
        self._keys, self._places = keys, [None] * self.slots
        self._texts = self._search.empty(self.slots, like.device)
        self._images = image_pool(stack.config, stack.image_to_kv[0], self.slots, keys,
                                  each * config.max_length, like)
        self._cache = SelfCache(stack.config, self.slots, each, config.max_length, like)

    def _shrink(self) -> None:
        """Drop free slots if they are half of the slots, or more: it costs a copy of the others. They come
        back when requests enter."""
        taken = [slot for slot, place in enumerate(self._places) if place is not None]
        if 2 * len(taken) <= len(self._places):
            slots = torch.tensor(taken, device=self._texts.lengths.device)
            self._texts = narrow(self._texts, slots)
            self._images.keep(slots)
            self._cache.keep(slots)
            self._places = [self._places[slot] for slot in taken]

    def _grow(self) -> None:
        """Twice the slots, `self.slots` at most: it costs a copy of those that there are."""
        more = min(self.slots, 2 * len(self._places)) - len(self._places)
        empty = self._search.empty(more, self._texts.lengths.device)
        self._texts = extend(self._texts, empty)  # type: ignore[arg-type]
        self._images.add(more)
        self._cache.add(more)
        self._places += [None] * more


def _room(model: BlipModel, states: ImageStates) -> int:
    """Keys of a slot for an image. All images have the same number. Questions get a multiple of 64, so that
    all questions of usual length get the same."""
    unit = QUESTION_KEYS if model.config.text_stacks == "untied" else 1
    return -(-len(states.rows) // unit) * unit


def _check_config(model: BlipModel, config: GenerationConfig) -> None:
    text, sep_id = model.config.text, model.config.tokens.sep
    if config.max_length > text.max_positions:
        raise ValueError(f"max_length is {config.max_length}: this model has {text.max_positions} positions")
    if 2 * config.beams >= text.vocab_size:
        raise ValueError(f"beams is {config.beams}: at most {(text.vocab_size - 1) // 2} with "
                         f"{text.vocab_size} tokens")
    if config.texts_per_image > MOST_ROWS:
        raise ValueError(f"{config.texts_per_image} beams or samples of an image: at most {MOST_ROWS}")
    for sequence in config.banned:
        if max(sequence) >= text.vocab_size or sequence == (sep_id,):
            raise ValueError(f"banned holds {list(sequence)}: ids are below {text.vocab_size}, and [SEP] "
                             f"({sep_id}) alone ends texts")


def _check_prompt(prompt: Sequence[int], config: GenerationConfig) -> None:
    if not 1 <= len(prompt) < config.max_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens with the first one: it needs one at least, "
                         f"and max_length ({config.max_length}) must be greater")
