"""Greedy search and nucleus sampling (Holtzman et al., 2020), over slots of images: one text, or several
samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.generate.texts import Texts, adjust, enter, no_texts


@dataclass(frozen=True)
class Samples(Texts):
    """Texts that continue independently. One that has ended waits for the others of its image."""

    scores: Tensor  # [slots, each]: `sums` over the length at the text's end, by the config's rule
    uniforms: Tensor  # [slots, each, max_length]: the random number of each step
    ended: Tensor  # bool [slots, each]


class Sampling:
    """The likeliest next token, or with `top_p` a random one of the nucleus, until [SEP] or `max_length`.

    Sample *i* of an image draws with the *i*-th `max_length` numbers of a generator with the image's seed.
    """

    def __init__(self, config: GenerationConfig, sep_id: int) -> None:
        self.config, self.sep_id = config, sep_id

    def empty(self, slots: int, device: torch.device) -> Samples:
        texts = no_texts(slots, self.config, device)
        uniforms = torch.zeros(texts["token_ids"].shape, device=device)
        return Samples(**texts, scores=texts["sums"].clone(), uniforms=uniforms, ended=texts["sums"].bool())

    def enter(self, samples: Samples, slot: int, prompt: Sequence[int], seed: int) -> None:
        enter(samples, slot, prompt)
        samples.scores[slot], samples.ended[slot] = 0.0, False
        if self.config.top_p is not None:  # drawn on the CPU: the same on any device
            numbers = torch.rand(samples.uniforms.shape[1:], generator=torch.Generator().manual_seed(seed))
            samples.uniforms[slot] = numbers.to(samples.uniforms.device)

    def advance(self, samples: Samples, logits: Tensor) -> Samples:
        """One step by next-token `logits`, float32 [slots, each, vocab_size], which may be written into.
        Scores of ended texts stay."""
        config, lengths = self.config, samples.lengths + 1
        log_norms = logits.logsumexp(-1)
        scores = adjust(logits, samples, config, self.sep_id)
        end = samples.lengths[:, None, None].expand(*samples.sums.shape, 1)
        if config.top_p is None:
            tokens = scores.argmax(-1)
        else:
            tokens = draw(scores.flatten(0, 1), samples.uniforms.gather(2, end).flatten(),
                          config).view_as(samples.sums)
        sums = samples.sums + logits.gather(2, tokens[..., None]).squeeze(2) - log_norms
        ends = tokens == self.sep_id
        whole, without_sep = (sums / config.score_divisors(lengths, samples.prompt_lengths, ended)[:, None]
                              for ended in (True, False))
        ended = samples.ended | ends
        return replace(
            samples, token_ids=samples.token_ids.scatter(2, end, tokens[..., None]), lengths=lengths,
            sums=sums, ended=ended, done=ended.all(1) | (lengths == config.max_length),
            scores=torch.where(samples.ended, samples.scores, torch.where(ends, whole, without_sep)))

    def results(self, samples: Samples, slot: int) -> tuple[Tensor, Tensor]:
        """The texts of a slot, likeliest first: ids int64 [each, max_length], to be read up to the first
        [SEP] after the prompt, and scores [each] from the model's own probabilities (before penalties,
        temperature, nucleus)."""
        scores, order = samples.scores[slot].sort(descending=True, stable=True)
        return samples.token_ids[slot, order], scores


def draw(scores: Tensor, uniforms: Tensor, config: GenerationConfig) -> Tensor:
    """Scores [rows, vocab_size], random numbers [rows] from [0, 1) → a token of each row's nucleus, int64
    [rows]."""
    probs, tokens = nucleus(scores, config)
    cumulative = probs.cumsum(-1)
    ranks = torch.searchsorted(cumulative, uniforms.to(probs.dtype)[:, None] * cumulative[:, -1:], right=True)
    return tokens.gather(1, ranks.clamp(max=probs.shape[1] - 1)).squeeze(1)


def nucleus(scores: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens at the given temperature, likeliest first: (probabilities [rows, k], zero
    outside the smallest set that holds `top_p` of their probability; token ids [rows, k])."""
    assert config.top_p is not None
    logits, tokens = (scores / config.temperature).topk(min(config.top_k, scores.shape[1]))
    probs = logits.softmax(-1)
    probability_before = probs.cumsum(-1) - probs
    inside = probability_before < config.top_p
    inside[:, 0] = True  # rounding must not empty it
    return probs * inside, tokens
