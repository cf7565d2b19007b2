"""How to generate a text. Defaults are those of BLIP's captioning with transformers' meaning of every
option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BeamRule = Literal["transformers5", "authors"]


@dataclass(frozen=True)
class GenerationConfig:
    """Greedy with one beam, beam search with more, nucleus sampling where `top_p` is given.

    `n_best` texts are returned for each image: of a beam search the best finished ones, of sampling that many
    samples, the likeliest first.

    Two rules say how finished beams are scored and when the search may stop; `transformers5` is what today's
    transformers does, `authors` what the published code does (it runs on transformers 4.15):

    | rule            | score of a text                                                              |
    |-----------------|------------------------------------------------------------------------------|
    | `transformers5` | Σ log p / generated tokens ** length_penalty, `[SEP]` counted                |
    | `authors`       | Σ log p / all tokens ** length_penalty, the prompt counted, `[SEP]` not      |
    """

    beams: int = 1
    max_length: int = 20  # tokens, the first one and the prompt included
    min_length: int = 0  # [SEP] cannot come before this many tokens, counted as above
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred already less likely
    length_penalty: float = 1.0
    beam_rule: BeamRule = "transformers5"
    top_p: float | None = None  # sample from the likeliest tokens that together have this probability
    top_k: int = 50  # … and are among the k likeliest, as in transformers and in the published CapFilt
    temperature: float = 1.0
    seed: int = 0  # of sampling
    n_best: int = 1
    banned: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that no text may contain after its prompt

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, got {self.beams}")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2 (the first token and one more), got "
                             f"{self.max_length}")
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length must lie in 0 … max_length ({self.max_length}), got "
                             f"{self.min_length}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.beam_rule not in ("transformers5", "authors"):
            raise ValueError(f"beam_rule must be transformers5 or authors, got {self.beam_rule!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_p is not None and self.beams > 1:
            raise ValueError(f"top_p samples one text: it needs beams=1, got {self.beams}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0 … 2⁶³ − 1, got {self.seed}")
        if self.n_best < 1 or (self.top_p is None and self.n_best > self.beams):
            raise ValueError(f"n_best is {self.n_best}: it must lie in 1 … beams ({self.beams}) unless top_p "
                             "samples")
        if not all(self.banned) or any(token < 0 for sequence in self.banned for token in sequence):
            raise ValueError(f"banned must hold sequences of at least one token id, got {self.banned}")

    @property
    def texts_per_image(self) -> int:
        """How many texts of an image are written at a time: beams, or samples."""
        return self.beams if self.top_p is None else self.n_best

    def score_divisors(self, lengths: Tensor, prompt_lengths: Tensor, ended: bool) -> Tensor:
        """The divisors of Σ log p of texts of `lengths` tokens, float32. `ended`: the last token is [SEP]."""
        counted = lengths - int(ended) if self.beam_rule == "authors" else lengths - prompt_lengths
        powers = torch.tensor([1.0, *(n**self.length_penalty for n in range(1, self.max_length + 1))])
        return powers.to(lengths.device)[counted]
