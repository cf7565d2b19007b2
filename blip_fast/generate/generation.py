"""The one entrance to generation: from what is seen of an image and a prompt to texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from blip_kernels.decode_attention import MOST_ROWS

from blip_fast.generate.continuous_batch import ContinuousBatch
from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.model.text import ImageStates

QUESTION_KEYS = 64  # rooms for encoded questions are multiples of this


@dataclass(frozen=True)
class Generated:
    """A generated text.

    `token_ids` is all of it, as transformers' `generate` returns it: [DEC] and the prompt, then what was generated,
    with [SEP] at the end unless it is `cut`: `max_length` ended it before it had come to its end. `score` follows the
    config's beam rule; without beams it is the same formula over the model's own probabilities (before penalties,
    temperature and nucleus).
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


@torch.inference_mode()
def generate_stream(model: BlipModel, requests: Iterable[Request], config: GenerationConfig,
                    slots: int) -> Iterator[tuple[int, list[Generated]]]:
    """Texts for a stream of requests of any length, as they are finished.

    Args:
        model: with a text decoder, in evaluation mode.
        requests: read as there is room; at most `slots` are held at a time.
        config: the kind of search and its options.
        slots: images that are worked on together. A text depends on its request and the config alone, never on
            `slots`, on its place or on the other requests.

    Yields:
        The request's place in the stream, and its `config.n_best` texts, best first (fewer where a beam search found
        fewer).

    Raises:
        ValueError: the model is in training mode, no slots; a prompt that leaves no room below `max_length`.
    """
    generation, waiting, held = Generation(model, config, slots), enumerate(requests), None
    while True:
        while generation.free:
            held = held or next(waiting, None)
            if held is None or not generation.enter(*held):
                break
            held = None
        if generation.idle:
            return
        yield from generation.step()


class Generation:
    """Texts that are being written: requests enter one by one, step by step, and leave when their texts are finished.

    Everything that `generate_stream` says of its arguments and its texts holds here.
    """

    def __init__(self, model: BlipModel, config: GenerationConfig, slots: int) -> None:
        """`slots` requests at a time. Raises ValueError as `generate_stream`."""
        if model.training:
            raise ValueError("the model is in training mode, dropout would change the texts: call model.eval() first")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        _check_config(model, config)
        self.model, self.config, self.slots = model, config, slots
        self._batch: ContinuousBatch | None = None
        self._prompt_lengths: dict[int, int] = {}  # of the requests that are in

    @property
    def free(self) -> int:
        """How many requests may enter, where they need the room that the others have."""
        return self.slots if self._batch is None else self._batch.free

    @property
    def idle(self) -> bool:
        return self._batch is None or self._batch.idle

    @torch.inference_mode()
    def enter(self, place: int, request: Request) -> bool:
        """Begin request number `place`. False where it has to wait: no slot is free, or it needs other room than those
        that are in, and neighbours must not change a text. Raises ValueError for its prompt as `generate_stream`."""
        _check_prompt(request.prompt, self.config)
        states, keys = request.states.rows, _room(self.model, request.states)
        if self._batch is None or (self._batch.idle and self._batch.keys != keys):
            self._batch = ContinuousBatch(self.model, self.config, self.slots, keys, states)
        if self._batch.keys != keys or not self._batch.free:
            return False
        self._batch.enter(place, states, request.prompt, request.seed)
        self._prompt_lengths[place] = len(request.prompt)
        return True

    def leave(self, place: int) -> None:
        """Stop writing for a request; nothing happens where it is done, or never entered."""
        if self._batch is not None and self._prompt_lengths.pop(place, None) is not None:
            self._batch.leave(place)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Generated]]]:
        """Compute a token of every text. Call it when all that may enter have done so: what is free is not computed.

        Returns the requests that this finishes: their numbers and texts.
        """
        if self._batch is None or self._batch.idle:
            return []
        if self._batch.free:
            self._batch.shrink()
        return [(place, _texts(token_ids.tolist(), scores.tolist(), self._prompt_lengths.pop(place),
                               self.model.config.tokens.sep))
                for place, token_ids, scores in self._batch.step()]


def generate(model: BlipModel, states: ImageStates, prompts: Sequence[Sequence[int]], config: GenerationConfig,
             seeds: Sequence[int] | None = None) -> list[Generated]:
    """The best text of each image, in their order.

    Args:
        states: `image_states(image_embeds)`, or `model.question_states(...)`.
        prompts: token ids of each image's prompt, [DEC] first, without [SEP].
        seeds: one per image, for sampling.

    Raises:
        ValueError: as `generate_stream`; not as many prompts or seeds as images; sampling without seeds.
    """
    images = len(states.offsets) - 1
    if len(prompts) != images:
        raise ValueError(f"prompts must be one per image: {images} images, {len(prompts)} prompts")
    if config.top_p is not None and (seeds is None or len(seeds) != images):
        raise ValueError(f"sampling needs one seed per image: {images} images, seeds {seeds}")
    requests = map(Request, states.split(), prompts, seeds or [0] * images)
    texts = dict(generate_stream(model, requests, config, max(images, 1)))
    return [texts[i][0] for i in range(images)]


def _texts(ids: list[list[int]], scores: list[float], prompt_length: int, sep_id: int) -> list[Generated]:
    """Texts up to their [SEP]; those with a score of −∞ are none."""
    whole = [sep_id in text[prompt_length:] for text in ids]
    return [Generated(text[: text.index(sep_id, prompt_length) + 1] if ends else text, score, not ends)
            for text, score, ends in zip(ids, scores, whole, strict=True) if score > -torch.inf]


def _room(model: BlipModel, states: ImageStates) -> int:
    """Keys of the slots in which an image stands. Images all have the same number; questions get a multiple of 64, and
    so all that are of usual length the same."""
    unit = QUESTION_KEYS if model.config.text_stacks == "untied" else 1
    return -(-len(states.rows) // unit) * unit


def _check_config(model: BlipModel, config: GenerationConfig) -> None:
    text, sep_id = model.config.text, model.config.tokens.sep
    if config.max_length > text.max_positions:
        raise ValueError(f"max_length is {config.max_length}: this model has {text.max_positions} positions")
    if 2 * config.beams >= text.vocab_size:
        raise ValueError(f"beams is {config.beams}: at most {(text.vocab_size - 1) // 2} with {text.vocab_size} tokens")
    if config.texts_per_image > MOST_ROWS:
        raise ValueError(f"{config.texts_per_image} beams or samples of an image: at most {MOST_ROWS}")
    for sequence in config.banned:
        if max(sequence) >= text.vocab_size or sequence == (sep_id,):
            raise ValueError(f"banned holds {list(sequence)}: ids are below {text.vocab_size}, and [SEP] ({sep_id}) "
                             "alone ends texts")


def _check_prompt(prompt: Sequence[int], config: GenerationConfig) -> None:
    if not 1 <= len(prompt) < config.max_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens with the first one: it needs one at least, and "
                         f"max_length ({config.max_length}) must be greater")
