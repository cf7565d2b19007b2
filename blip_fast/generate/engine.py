"""The one entrance to generation: from an image's keys and values and a prompt to a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


@torch.inference_mode()
def generate(model: BlipModel, image_kv: ImageKV, prompts: Tensor, config: GenerationConfig,
             seeds: Sequence[int] | None = None) -> list[Generated]:
    """Generate one text per image.

    Args:
        model: with a text decoder, in evaluation mode.
        image_kv: `model.stack("decoder").image_kv(image_embeds)`, or of encoded questions.
        prompts: int64 [images, prompt length], [DEC] first, without [SEP].
        config: the kind of search and its options.
        seeds: one per image, for sampling. A text depends on its image, its seed and the config alone, never on the
            other images of the batch.

    Raises:
        ValueError: prompts that leave no room below `max_length`, or positions; sampling without seeds.
    """
    _check(model, image_kv, prompts, config, seeds)
    if len(prompts) == 0:
        return []
    sep_id = model.config.tokens.sep
    decoder = Decoder(model, image_kv, config)
    if config.beams > 1:
        token_ids, scores = beam_search(decoder, prompts, config, sep_id)
    else:
        uniforms = _uniforms(seeds or [0] * len(prompts), config.max_length).to(prompts.device)
        token_ids, scores = sample(decoder, prompts, config, sep_id, uniforms)
    prompt_length = prompts.shape[1]
    return [Generated(ids[: ids.index(sep_id, prompt_length) + 1] if sep_id in ids[prompt_length:] else ids, score)
            for ids, score in zip(token_ids.tolist(), scores.tolist(), strict=True)]


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """[images, steps] from [0, 1), each row by its own generator: the same whatever the batch, on any device."""
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _check(model: BlipModel, image_kv: ImageKV, prompts: Tensor, config: GenerationConfig,
           seeds: Sequence[int] | None) -> None:
    images, text = len(image_kv.offsets) - 1, model.config.text
    if model.training:
        raise ValueError("the model is in training mode, dropout would change the texts: call model.eval() first")
    if prompts.ndim != 2 or prompts.dtype != torch.int64 or len(prompts) != images or prompts.shape[1] < 1:
        raise ValueError(f"prompts must be int64 [{images} images, at least 1 token], got {prompts.dtype} "
                         f"{list(prompts.shape)}")
    if prompts.shape[1] >= config.max_length:
        raise ValueError(f"the prompt has {prompts.shape[1]} tokens with the first one: max_length "
                         f"({config.max_length}) must be greater")
    if config.max_length > text.max_positions:
        raise ValueError(f"max_length is {config.max_length}: this model has {text.max_positions} positions")
    if 2 * config.beams >= text.vocab_size:
        raise ValueError(f"beams is {config.beams}: at most {(text.vocab_size - 1) // 2} with {text.vocab_size} tokens")
    if config.top_p is not None and (seeds is None or len(seeds) != images):
        raise ValueError(f"sampling needs one seed per image: {images} images, seeds {seeds}")
