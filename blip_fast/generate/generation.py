"""The one entrance to generation: from what is seen of an image and a prompt to texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from blip_fast.generate.continuous_batch import Generated, Generation, Request
from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageStates


@torch.inference_mode()
def generate_stream(model: BlipModel, requests: Iterable[Request], config: GenerationConfig,
                    slots: int) -> Iterator[tuple[int, list[Generated]]]:
    """Texts for a stream of requests of any length, as they are finished.

    Args:
        model: with a text decoder, in evaluation mode.
        requests: read as there is room; at most `slots` are held at a time.
        config: the kind of search and its options.
        slots: images that are worked on together. A text depends on its request and the config alone, never
            on `slots`, on its place or on the other requests.

    Yields:
        The request's place in the stream, and its `config.n_best` texts, best first (fewer where a beam
        search found fewer).

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


def generate(model: BlipModel, states: ImageStates, prompts: Sequence[Sequence[int]],
             config: GenerationConfig, seeds: Sequence[int] | None = None) -> list[Generated]:
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
