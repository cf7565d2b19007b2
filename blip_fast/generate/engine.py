"""The one entrance to generation: from an image's keys and values and a prompt to texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.generate.beam import beam_search
from blip_fast.generate.config import GenerationConfig
from blip_fast.generate.decoder import Decoder
from blip_fast.generate.sample import sample
from blip_fast.model import BlipModel
from blip_fast.text import ImageKV


@dataclass(frozen=True)
class Generated:
    """A generated text.

    `token_ids` is all of it, as transformers' `generate` returns it: [DEC] and the prompt, then what was generated,
    with [SEP] at the end unless `max_length` cut it off. `score` follows the config's beam rule; without beams it is
    the same formula over the model's own probabilities (before penalties, temperature and nucleus).
    """

    token_ids: list[int]
    score: float


@dataclass(frozen=True)
class Request:
    """An image, or an encoded question, of which texts are wanted."""

    image_kv: ImageKV  # of one image: `model.stack("decoder").image_kv(...)` or `model.question_kv(...)`
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
    places = enumerate(requests)
    while group := list(islice(places, slots)):
        by_length = defaultdict(list)
        for place, request in group:
            by_length[len(request.prompt)].append((place, request))
        for same in by_length.values():
            yield from zip([place for place, _ in same],
                           _generate_together(model, [request for _, request in same], config), strict=True)


def generate(model: BlipModel, image_kv: ImageKV, prompts: Sequence[Sequence[int]], config: GenerationConfig,
             seeds: Sequence[int] | None = None) -> list[Generated]:
    """The best text of each image, in their order.

    Args:
        image_kv: `model.stack("decoder").image_kv(image_embeds)`, or of encoded questions.
        prompts: token ids of each image's prompt, [DEC] first, without [SEP].
        seeds: one per image, for sampling.

    Raises:
        ValueError: as `generate_stream`; not as many prompts or seeds as images; sampling without seeds.
    """
    images = len(image_kv.offsets) - 1
    if len(prompts) != images:
        raise ValueError(f"prompts must be one per image: {images} images, {len(prompts)} prompts")
    if config.top_p is not None and (seeds is None or len(seeds) != images):
        raise ValueError(f"sampling needs one seed per image: {images} images, seeds {seeds}")
    requests = [Request(image_kv.select(torch.tensor([i])), prompt, seed)
                for i, (prompt, seed) in enumerate(zip(prompts, seeds or [0] * images, strict=True))]
    texts = dict(generate_stream(model, requests, config, max(images, 1)))
    return [texts[i][0] for i in range(images)]


def _generate_together(model: BlipModel, requests: Sequence[Request],
                       config: GenerationConfig) -> list[list[Generated]]:
    """Requests with prompts of one length."""
    device = requests[0].image_kv.offsets.device
    prompts = torch.tensor([request.prompt for request in requests], device=device)
    _check(model, prompts, config)
    sep_id, prompt_length = model.config.tokens.sep, prompts.shape[1]
    if config.beams > 1:
        decoder = Decoder(model, _packed([request.image_kv for request in requests]), config)
        token_ids, scores = beam_search(decoder, prompts, config, sep_id)
    else:
        drawn = 1 if config.top_p is None else config.n_best
        kv = _packed([request.image_kv for request in requests for _ in range(drawn)])
        uniforms = torch.cat([_uniforms(request.seed, drawn, config.max_length) for request in requests])
        token_ids, scores = sample(Decoder(model, kv, config), prompts.repeat_interleave(drawn, 0), config, sep_id,
                                   uniforms.to(device))
        scores, order = scores.unflatten(0, (-1, drawn)).sort(dim=1, descending=True, stable=True)
        token_ids = token_ids.unflatten(0, (-1, drawn)).take_along_dim(order[..., None], 1)
    return [[Generated(_until(ids, sep_id, prompt_length), score) for ids, score in zip(*best, strict=True)
             if score > -torch.inf] for best in zip(token_ids.tolist(), scores.tolist(), strict=True)]


def _until(ids: list[int], sep_id: int, prompt_length: int) -> list[int]:
    return ids[: ids.index(sep_id, prompt_length) + 1] if sep_id in ids[prompt_length:] else ids


def _packed(parts: Sequence[ImageKV]) -> ImageKV:
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return ImageKV(tuple(map(torch.cat, zip(*(part.kv for part in parts), strict=True))),
                   F.pad(lengths.cumsum(0), (1, 0)).int())


def _uniforms(seed: int, samples: int, steps: int) -> Tensor:
    """[samples, steps] from [0, 1): sample i takes the i-th `steps` numbers of the seed's generator, on any device."""
    return torch.rand(samples, steps, generator=torch.Generator().manual_seed(seed))


def _check(model: BlipModel, prompts: Tensor, config: GenerationConfig) -> None:
    text = model.config.text
    if model.training:
        raise ValueError("the model is in training mode, dropout would change the texts: call model.eval() first")
    if prompts.shape[1] >= config.max_length:
        raise ValueError(f"the prompt has {prompts.shape[1]} tokens with the first one: max_length "
                         f"({config.max_length}) must be greater")
    if config.max_length > text.max_positions:
        raise ValueError(f"max_length is {config.max_length}: this model has {text.max_positions} positions")
    if 2 * config.beams >= text.vocab_size:
        raise ValueError(f"beams is {config.beams}: at most {(text.vocab_size - 1) // 2} with {text.vocab_size} tokens")
