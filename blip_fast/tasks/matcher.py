"""Scores texts against images: matching probability and contrastive cosine (BLIP section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixel_batches

MAX_TOKENS = 35  # of a text, as published for retrieval and matching
# Texts per pass through the stack. On a CPU their states should stay in its caches: at base size in bfloat16,
# 32 texts took 16 ms each, and 192 texts 23 ms each. Grouping texts of equal length made no difference.
CPU_TEXTS, GPU_TEXTS = 32, 512
MAX_IMAGES = 16  # images whose keys and values are in memory at a time (base, 384 px, float32: 42 MB each)


@dataclass(frozen=True, eq=False)
class MatchScores:
    """Scores of images with texts, float32 on the CPU: [images, texts] for all combinations, or [pairs]."""

    itm: Tensor  # probability that they match, by the matching head
    itc: Tensor  # cosine of their contrastive features, −1 to 1


class Matcher(PretrainedTask):
    """Scores texts against images, with a matching checkpoint such as `Salesforce/blip-itm-base-coco`.

    Examples:
        >>> matcher = Matcher.from_pretrained(checkpoint)
        >>> scores = matcher.score(photos, ["a dog on grass", "two people", "a red ball"])
        >>> scores.itm.shape == scores.itc.shape == (len(photos), 3)
        True
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model has no matching head or no contrastive projections."""
        for part in ("matching", "contrastive"):
            if not getattr(model.config, part):
                raise ValueError(f"this model has no {part} head: take an image-text retrieval or "
                                 "pre-training checkpoint")
        super().__init__(model, tokenizer)

    def score(self, images: ImageSource | Sequence[ImageSource], texts: str | Sequence[str], *,
              first_token: str = "[CLS]", batch_size: int = 16) -> MatchScores:
        """Score every image (paths, encoded bytes, Pillow images or uint8 arrays) with every text.

        Args:
            first_token: the first token of a text for the matching head: `[CLS]` as in transformers and in
                the published inference code, `[ENC]` as in training and in the published retrieval
                evaluation.
            batch_size: images per batch.

        Returns:
            Scores [images, texts].

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: a text has no token; another first token.
        """
        packed = self.pack([texts] if isinstance(texts, str) else texts, first_token)
        batches = pixel_batches(as_sources(images), self.model.config.vision.image_size, batch_size)
        features = self._text_features(packed)
        scores = [self._score_all(batch, packed, features) for batch in batches]
        empty = torch.empty(0, len(packed))
        return MatchScores(torch.cat([empty, *(s.itm for s in scores)]),
                           torch.cat([empty, *(s.itc for s in scores)]))

    def pack(self, texts: Sequence[str], first_token: str = "[CLS]") -> PackedTexts:
        """Tokenise texts, at most 35 tokens each. Raises ValueError naming a text without a token."""
        packed = self.tokenizer.pack(texts, first_token, MAX_TOKENS)
        for text, length in zip(texts, packed.lengths.tolist(), strict=True):
            if length == 2:
                raise ValueError(f"the text {text!r} has no token: every text to be scored needs a word")
        return packed

    def score_pixels(self, pixels: Tensor, texts: PackedTexts) -> MatchScores:
        """Score one batch of images, float [images, 3, image_size, image_size] after the evaluation
        transform, with every text: scores [images, texts].

        The matching head reads `texts` with the first token that they have; cosines always use [CLS].
        """
        return self._score_all(pixels, texts, self._text_features(texts))

    def score_pairs(self, pixels: Tensor, texts: PackedTexts, image_of_text: Tensor) -> MatchScores:
        """`score_pixels` of each text with one image only: that of `image_of_text` (int64 [texts], sorted).
        Returns scores [texts]."""
        pairs = torch.stack([image_of_text, torch.arange(len(texts))], dim=1)
        image_features, itm = self._match(pixels, texts, pairs)
        features = image_features[image_of_text.to(image_features.device)]
        return MatchScores(itm, (features * self._text_features(texts)).sum(dim=1).cpu())

    def _score_all(self, pixels: Tensor, texts: PackedTexts, text_features: Tensor) -> MatchScores:
        pairs = torch.cartesian_prod(torch.arange(len(pixels)), torch.arange(len(texts)))
        image_features, itm = self._match(pixels, texts, pairs)
        return MatchScores(itm.view(len(pixels), len(texts)), (image_features @ text_features.T).cpu())

    def _match(self, pixels: Tensor, texts: PackedTexts, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive features of images [images, embed_dim], and probabilities [pairs] on the CPU."""
        model = self.model
        with evaluating(model):
            for embeds in encode_images(model, [pixels]):
                logits = match_pairs(model, embeds.__getitem__, texts.to(embeds.device),
                                     pairs.to(embeds.device))
                return model.image_features(embeds), logits.softmax(-1)[:, 1].cpu()
        return torch.empty(0, model.config.embed_dim, device=model.vision.cls_token.device), torch.empty(0)

    def _text_features(self, texts: PackedTexts) -> Tensor:
        with evaluating(self.model):
            return text_features(self.model, texts)


def text_features(model: BlipModel, texts: PackedTexts) -> Tensor:
    """Contrastive features [texts, embed_dim] of any number of texts, on the model's device. Their first
    tokens are replaced by [CLS]. Call it within `evaluating`."""
    texts = texts.to(model.vision.cls_token.device).with_first(model.config.tokens.cls)
    every = torch.arange(len(texts), device=texts.device)
    some = every.split(texts_at_a_time(texts.device))
    return torch.cat([torch.empty(0, model.config.embed_dim, device=texts.device),
                      *(model.text_features(texts.select(few)) for few in some if len(few))])


def image_of_each(texts: Sequence[Sequence[str]]) -> Tensor:
    """Each image's texts → the image of each text, int64 [texts]."""
    return torch.tensor([image for image, mine in enumerate(texts) for _ in mine], dtype=torch.int64)


def texts_at_a_time(device: torch.device) -> int:
    return CPU_TEXTS if device.type == "cpu" else GPU_TEXTS


def match_pairs(model: BlipModel, image_embeds: Callable[[Tensor], Tensor], texts: PackedTexts, pairs: Tensor,
                progress: Callable[[int, int], None] | None = None) -> Tensor:
    """ITM logits (not matched, matched) of many pairs, image by image. An image's keys and values are
    projected once, and all its texts read them together. Call it within `evaluating`.

    Args:
        image_embeds: returns the embeds of a few images (from `encode_images`), [n, tokens, vision width],
            given their numbers, int64 [n]. Each image is requested once.
        texts: on the model's device, with the first tokens for the matching head.
        pairs: int64 [pairs, 2] of (image, text) on the model's device, sorted by image.
        progress: called with the number of pairs done and their total.

    Returns:
        [pairs, 2], float32.
    """
    stack, most = model.stack("encoder"), texts_at_a_time(pairs.device)
    logits = [torch.empty(0, 2, device=pairs.device)]
    done = 0
    for images, counts in _image_groups(pairs[:, 0], most):
        image_kv = stack.image_kv(image_embeds(images))
        here = torch.arange(len(images), device=pairs.device).repeat_interleave(counts)
        for image, text in zip(here.split(most), pairs[done : done + len(here), 1].split(most), strict=True):
            logits.append(model.match_logits(texts.select(text), image, image_kv))
        done += len(here)
        if progress is not None:
            progress(done, len(pairs))
    return torch.cat(logits)


def _image_groups(image_of_pair: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of (images, pairs of each): at most MAX_IMAGES images and `most` pairs, at least one image."""
    images, counts = image_of_pair.unique_consecutive(return_counts=True)
    first, pairs = 0, 0
    for last, count in enumerate(counts.tolist()):
        if last > first and (last - first == MAX_IMAGES or pairs + count > most):
            yield images[first:last], counts[first:last]
            first, pairs = last, 0
        pairs += count
    if len(images):
        yield images[first:], counts[first:]
