"""Image-text retrieval: cosines for all pairs, the matching head for the best of each direction (BLIP section 5.1).

The published evaluation re-ranks direction by direction and encodes an image's keys and values again for every text.
Here the candidates of both directions are united and walked image by image: an image's keys and values are projected
once and all its candidate texts, packed, read them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.inference import encode_images, evaluating
from blip_fast.metrics.recall import chance_recalls, recalls
from blip_fast.model import BlipModel
from blip_fast.packing import PackedTexts

NOT_CANDIDATE = -100.0  # the published score of pairs that were not re-ranked
TEXT_BATCH = 256
MAX_PAIRS = 512  # texts that pass the stack together
MAX_IMAGES = 16  # images whose keys and values exist at a time (base, 384 px, float32: 42 MB each)


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Scores of every image with every text, on the model's device, float32.

    `cosines` [images, texts] are ITC's. `image_to_text` [images, texts] and `text_to_image` [texts, images] are ITM's
    'matched' logit + cosine where the pair was a candidate of that direction, −100 elsewhere; without re-ranking they
    are the cosines. `pairs` is how many pairs the matching head has seen.
    """

    cosines: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    pairs: int

    def recalls(self, image_of_text: Tensor) -> dict[str, float]:
        """`i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, …, 0 to 1, ties counted against the model.

        image_of_text: int64 [texts], the image that each text describes. Every image needs a text.
        """
        right = self._right(image_of_text)
        return _both_ways(recalls(self.image_to_text, right), recalls(self.text_to_image, right.T))

    def chances(self, image_of_text: Tensor) -> dict[str, float]:
        """The recalls of a random order, under the names of `recalls`."""
        right = self._right(image_of_text)
        return _both_ways(chance_recalls(right), chance_recalls(right.T))

    def _right(self, image_of_text: Tensor) -> Tensor:
        images, texts = self.cosines.shape
        if len(image_of_text) != texts:
            raise ValueError(f"image_of_text names {len(image_of_text)} images for {texts} texts: one each is needed")
        return torch.arange(images, device=self.cosines.device)[:, None] == image_of_text.to(self.cosines.device)


def _both_ways(image_to_text: dict[int, float], text_to_image: dict[int, float]) -> dict[str, float]:
    return {f"i2t_r{k}": v for k, v in image_to_text.items()} | {f"t2i_r{k}": v for k, v in text_to_image.items()}


def retrieve(model: BlipModel, images: Tensor | Iterable[Tensor], texts: PackedTexts, top_k: int = 256, *,
             first_token: str = "[ENC]", progress: Callable[[int, int], None] | None = None) -> RetrievalResult:
    """Score every image with every text.

    Args:
        model: one with a text encoder, the projections and, for `top_k` > 0, the matching head.
        images: float [images, 3, size, size], or batches of them in order.
        texts: the texts; their first tokens are replaced: [CLS] for cosines, `first_token` for matching.
        top_k: how many candidates the matching head re-ranks, of each image and of each text, all where there are
            fewer (published: 256 for COCO, 128 for Flickr30k). 0 leaves the cosines as they are.
        first_token: what a text starts with before the matching head: `[ENC]` as in training and in the published
            retrieval evaluation, `[CLS]` as in the published inference code.
        progress: told, while re-ranking, how many pairs are done and how many there are.

    Raises:
        ValueError: there is no image or no text, `top_k` is negative, another first token, or the model lacks a head.
    """
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: give the number of candidates to re-rank, or 0 for cosines alone")
    token_ids = {"[CLS]": model.config.tokens.cls, "[ENC]": model.config.tokens.enc}
    if first_token not in token_ids:
        raise ValueError(f"first_token is {first_token!r}: the matching head reads one of {', '.join(token_ids)}")
    texts = texts.to(model.vision.cls_token.device)
    with evaluating(model):
        features, image_embeds = [], []  # embeds wait in main memory: of COCO's 5,000 images they are 9 GB
        for embeds in encode_images(model, images):
            features.append(model.image_features(embeds))
            image_embeds += embeds.cpu().unbind()
        if not features or len(texts) == 0:
            raise ValueError(f"retrieval needs images and texts, got {len(image_embeds)} and {len(texts)}")
        cosines = torch.cat(features) @ _text_features(model, texts).T
        if top_k == 0:
            return RetrievalResult(cosines, cosines, cosines.T, 0)
        of_image, of_text = _candidates(cosines, top_k, dim=1), _candidates(cosines, top_k, dim=0)
        pairs = (of_image | of_text).nonzero()
        scores = torch.full_like(cosines, NOT_CANDIDATE)
        texts = texts.with_first(token_ids[first_token])
        scores[pairs[:, 0], pairs[:, 1]] = _matched_logits(model, image_embeds, texts, pairs, progress)
    scores = scores + cosines
    return RetrievalResult(cosines, scores.masked_fill(~of_image, NOT_CANDIDATE),
                           scores.masked_fill(~of_text, NOT_CANDIDATE).T, len(pairs))


def _text_features(model: BlipModel, texts: PackedTexts) -> Tensor:
    texts = texts.with_first(model.config.tokens.cls)
    every = torch.arange(len(texts), device=texts.device)
    return torch.cat([model.text_features(texts.select(some)) for some in every.split(TEXT_BATCH)])


def _candidates(cosines: Tensor, top_k: int, dim: int) -> Tensor:
    """bool [images, texts], True at the `top_k` best along `dim`."""
    best = cosines.topk(min(top_k, cosines.shape[dim]), dim=dim).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(dim, best, True)


def _matched_logits(model: BlipModel, image_embeds: list[Tensor], texts: PackedTexts, pairs: Tensor,
                    progress: Callable[[int, int], None] | None) -> Tensor:
    """ITM's 'matched' logit [pairs] of (image, text) rows [pairs, 2] that stand sorted by image.

    image_embeds: of each image [tokens, vision width].
    """
    stack = model.stack("encoder")
    logits = []
    for first, last, rows in _image_groups(pairs[:, 0].bincount(minlength=len(image_embeds)).tolist()):
        image_kv = stack.image_kv(torch.stack(image_embeds[first:last]).to(pairs.device))
        for image, text in (chunk.unbind(1) for chunk in pairs[rows].split(MAX_PAIRS)):
            logits.append(model.match_logits(texts.select(text), image - first, image_kv)[:, 1])
        if progress is not None:
            progress(rows.stop, len(pairs))
    return torch.cat(logits)


def _image_groups(pairs_of_image: list[int]) -> Iterator[tuple[int, int, slice]]:
    """(first image, end image, their rows of the pairs): as many images as stay below both bounds, one at least."""
    first = row = 0
    while first < len(pairs_of_image):
        last, rows = first + 1, pairs_of_image[first]
        while (last < len(pairs_of_image) and last - first < MAX_IMAGES
               and rows + pairs_of_image[last] <= MAX_PAIRS):
            rows += pairs_of_image[last]
            last += 1
        yield first, last, slice(row, row + rows)
        first, row = last, row + rows
