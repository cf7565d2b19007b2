"""Re-ranking 64 images and 320 captions in both directions, compared with the published loop (same dtype).

The images' states and the cosines are random, since their values do not change what is computed. In the short
form both sides do 1/k of their work: ours scores the candidates (of both directions) of every kth image, the
published loop processes every kth image and every kth text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_bench import words
from blip_bench.baselines import published
from blip_bench.models import SEED, load_transformers
from blip_bench.peers.installed import missing
from blip_bench.timing import Case, Comparison, require
from blip_fast.inference.encoding import evaluating
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.tasks.matcher import MAX_TOKENS, Matcher, match_pairs

IMAGES, TEXTS = 64, 320
TARGETS = {16: 5.0, 64: 6.5}  # k: times as fast as the published loop in the same dtype
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}  # of a score


@dataclass(frozen=True)
class Work:
    """The input: image_embeds float32 [64, tokens, width]; captions that start with [ENC]; cosines float32
    [64, 320]; k candidates of each image and text; only every `share`-th image and text is processed."""

    image_embeds: Tensor
    texts: PackedTexts
    cosines: Tensor
    k: int
    share: int

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Masks, bool [64, 320]: the text is among the image's best; the image is among the text's best."""
        nothing = torch.zeros_like(self.cosines, dtype=torch.bool)
        of_images, of_texts = (nothing.scatter(dim, self.cosines.topk(self.k, dim).indices, True)
                               for dim in (1, 0))
        return of_images, of_texts


def cases(directory: Path, dtype: str, full: bool) -> Iterator[Case]:
    """k = 16 and 64, with the matcher in `directory`, in the short form or in `full`."""
    matcher = Matcher.from_pretrained(directory, dtype=dtype, device="cpu")
    theirs = load_transformers(directory, dtype) if missing("transformers") is None else None
    for k, target in TARGETS.items():
        work = make_work(matcher, k, 1 if full else k)
        calls = {f"ours {dtype}": partial(rerank, matcher, work)}
        if theirs is not None:
            calls[f"published loop {dtype}"] = partial(published_loop, theirs, work)
        yield Case(f"k = {k}, {dtype}" + f", a {k}th of the work" * (not full), calls,
                   tuple(Comparison(f"ours {dtype}", peer, target) for peer in list(calls)[1:]),
                   pairs_of(work), "candidates", check=partial(check, work, dtype),
                   warm_up=partial(warm_up, matcher, theirs, work))


def make_work(matcher: Matcher, k: int, share: int) -> Work:
    vision, draw = matcher.model.config.vision, torch.Generator().manual_seed(SEED)
    return Work(torch.randn(IMAGES, vision.tokens, vision.width, generator=draw),
                matcher.pack(words.captions(TEXTS, SEED), "[ENC]"), torch.rand(IMAGES, TEXTS, generator=draw),
                k, share)


def pairs_of(work: Work) -> int:
    """Candidates in the work's share. A pair of both directions counts twice, as in the published loop."""
    return (IMAGES + TEXTS) // work.share * work.k


def rerank(matcher: Matcher, work: Work) -> tuple[Tensor, Tensor]:
    """Scores float32 [64, 320] of the images' candidates and of the texts' candidates; −100 elsewhere."""
    of_images, of_texts = work.candidates()
    ours = torch.zeros_like(of_images)
    ours[:: work.share] = (of_images | of_texts)[:: work.share]
    pairs, model = ours.nonzero(), matcher.model
    embeds = work.image_embeds.to(model.vision.cls_token.dtype)
    with evaluating(model):
        logits = match_pairs(model, lambda images: embeds[images], work.texts, pairs)[:, 1]
    scores = work.cosines.index_put(tuple(pairs.T), logits, accumulate=True)
    of_images, of_texts = (scores.masked_fill(~(ours & of), published.NOT_CANDIDATE)
                           for of in (of_images, of_texts))
    return of_images, of_texts


def published_loop(model: Any, work: Work) -> tuple[Tensor, Tensor]:
    """The same scores by the published loop."""
    ids, mask = work.texts.to_padded(0)
    padding = (0, MAX_TOKENS - ids.shape[1])
    ids, mask = torch.nn.functional.pad(ids, padding), torch.nn.functional.pad(mask.long(), padding)
    return published.rerank(model, work.image_embeds.to(model.dtype), ids, mask, work.cosines, work.k,
                            range(0, IMAGES, work.share), range(0, TEXTS, work.share))


def warm_up(matcher: Matcher, theirs: Any, work: Work) -> None:
    """Process one image and its candidates."""
    least = Work(work.image_embeds, work.texts, work.cosines, 4, IMAGES)
    rerank(matcher, least)
    if theirs is not None:
        published_loop(theirs, least)


def check(work: Work, dtype: str, results: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The scores of all candidates that both sides scored must agree."""
    if (theirs := results.get(f"published loop {dtype}")) is None:
        return {}
    largest, compared = 0.0, 0
    for own, other in zip(results[f"ours {dtype}"], theirs, strict=True):
        both = (own != published.NOT_CANDIDATE) & (other != published.NOT_CANDIDATE)
        require(work.share > 1 or bool(((own != published.NOT_CANDIDATE) == both).all()),
                "candidates are not the same")
        require(bool(both.any()), "no candidate was scored by both sides")
        largest, compared = max(largest, float((own - other)[both].abs().max())), compared + int(both.sum())
    require(largest < TOLERANCES[dtype], f"a score in {dtype} is {largest:.1e} off the published loop's")
    return {"scores compared": compared, "largest difference": largest}
