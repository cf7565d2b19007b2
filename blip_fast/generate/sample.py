"""Greedy search and nucleus sampling (Holtzman et al., 2020): one text per image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip_fast.generate.config import GenerationConfig
from blip_fast.generate.decoder import Decoder, adjust, narrow, unfinished_if_few


@dataclass(frozen=True)
class Texts:
    """One unfinished text per image, all of one length; finished ones wait until they are dropped."""

    images: Tensor  # int64 [images]: which of the caller's images
    token_ids: Tensor  # int64 [images, length]
    sums: Tensor  # [images]: Σ log p of the generated tokens
    scores: Tensor  # [images]: the same over the length, by the config's rule
    uniforms: Tensor  # [images, max_length]: the random number of each step
    done: Tensor  # bool [images]


def sample(decoder: Decoder, prompts: Tensor, config: GenerationConfig, sep_id: int,
           uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest next token, or with `top_p` a random one of the nucleus, until [SEP] or `max_length`.

    Args:
        prompts: int64 [images, prompt length].
        uniforms: [images, max_length], from [0, 1): what each draw uses.

    Returns:
        Token ids int64 [images, max_length], to be read up to the first [SEP] behind the prompt, and scores [images]
        from the model's own probabilities (before penalties, temperature and nucleus).
    """
    images, prompt_length = prompts.shape
    device = prompts.device
    result_ids = prompts.new_full((images, config.max_length), sep_id)
    result_scores = torch.zeros(images, device=device)
    texts = Texts(
        images=torch.arange(images, device=device),
        token_ids=prompts,
        sums=torch.zeros(images, device=device),
        scores=torch.zeros(images, device=device),
        uniforms=uniforms,
        done=torch.zeros(images, dtype=torch.bool, device=device),
    )
    logits = decoder.prefill(prompts)
    for length in range(prompt_length + 1, config.max_length + 1):
        texts = _advance(texts, logits, prompt_length, config, sep_id)
        result_ids[texts.images, :length], result_scores[texts.images] = texts.token_ids, texts.scores
        going_on = unfinished_if_few(texts.done)
        if length == config.max_length or (going_on is not None and len(going_on) == 0):
            break
        rows = torch.arange(len(texts.images), device=device)
        if going_on is not None:
            texts, rows = narrow(texts, going_on), going_on
            decoder.keep_images(going_on)
        logits = decoder.step(rows, texts.token_ids[:, -1])
    return result_ids, result_scores


def _advance(texts: Texts, logits: Tensor, prompt_length: int, config: GenerationConfig, sep_id: int) -> Texts:
    """One step: choose each text's next token by `logits` [images, vocab_size]. Scores of finished texts stay."""
    scores = adjust(logits, texts.token_ids, config, sep_id)
    length = texts.token_ids.shape[1] + 1
    tokens = scores.argmax(-1) if config.top_p is None else draw(scores, texts.uniforms[:, length - 1], config)
    sums = texts.sums + logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    ended = tokens == sep_id
    score = torch.where(ended, sums / config.score_divisor(length, prompt_length, ended=True),
                        sums / config.score_divisor(length, prompt_length, ended=False))
    return replace(texts, token_ids=torch.cat([texts.token_ids, tokens[:, None]], dim=1), sums=sums,
                   scores=torch.where(texts.done, texts.scores, score), done=texts.done | ended)


def draw(scores: Tensor, uniforms: Tensor, config: GenerationConfig) -> Tensor:
    """Scores [rows, vocab_size], random numbers [rows] from [0, 1) → a token of each row's nucleus, int64 [rows]."""
    probs, tokens = nucleus(scores, config)
    cumulative = probs.cumsum(-1)
    ranks = torch.searchsorted(cumulative, uniforms.to(probs.dtype)[:, None] * cumulative[:, -1:], right=True)
    return tokens.gather(1, ranks.clamp(max=probs.shape[1] - 1)).squeeze(1)


def nucleus(scores: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens at the given temperature, likeliest first: (probabilities [rows, k], zero outside
    the smallest set that holds `top_p` of their probability; token ids [rows, k])."""
    assert config.top_p is not None
    logits, tokens = (scores / config.temperature).topk(min(config.top_k, scores.shape[1]))
    probs = logits.softmax(-1)
    probability_before = probs.cumsum(-1) - probs
    inside = probability_before < config.top_p
    inside[:, 0] = True  # rounding must not empty it
    return probs * inside, tokens
