"""How well texts describe images: the matching head's probability and the contrastive cosine (BLIP section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.images import ImageSource
from blip_fast.inference import encode_images, evaluating
from blip_fast.model import BlipModel
from blip_fast.packing import PackedTexts
from blip_fast.tasks.loading import PretrainedTask, as_sources, pixel_batches
from blip_fast.tokenizer import Tokenizer

MAX_TOKENS = 35  # of a text, as published for retrieval and matching
MAX_PAIRS = 512  # texts that pass the stack together


@dataclass(frozen=True, eq=False)
class MatchScores:
    """Scores of every image with every text, float32 [images, texts] on the CPU."""

    itm: Tensor  # probability that they match, by the matching head
    itc: Tensor  # cosine of their contrastive features, −1 to 1


class Matcher(PretrainedTask):
    """Scores texts against images. `Matcher.from_pretrained("Salesforce/blip-itm-base-coco")`."""

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model lacks the matching head or the contrastive projections."""
        for part in ("matching", "contrastive"):
            if not getattr(model.config, part):
                raise ValueError(f"this model has no {part} head: take an image-text retrieval or pre-training "
                                 "checkpoint")
        super().__init__(model, tokenizer)

    def score(self, images: ImageSource | Sequence[ImageSource], texts: str | Sequence[str], *,
              first_token: str = "[CLS]", batch_size: int = 16) -> MatchScores:
        """Score every image (paths, encoded bytes, Pillow images or uint8 arrays) with every text.

        Args:
            first_token: what a text starts with before the matching head. `[CLS]` as in transformers and in the
                published inference code, `[ENC]` as in training and in the published retrieval evaluation.
            batch_size: images at a time.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: a text has no token; another first token.
        """
        packed = self.pack([texts] if isinstance(texts, str) else texts, first_token)
        batches = pixel_batches(as_sources(images), self.model.config.vision.image_size, batch_size)
        scores = [self.score_pixels(batch, packed) for batch in batches]
        empty = torch.empty(0, len(packed))
        return MatchScores(torch.cat([empty, *(s.itm for s in scores)]), torch.cat([empty, *(s.itc for s in scores)]))

    def pack(self, texts: Sequence[str], first_token: str = "[CLS]") -> PackedTexts:
        """Texts → at most 35 tokens each, packed. Raises ValueError naming a text that has no token of its own."""
        packed = self.tokenizer.pack(texts, first_token, MAX_TOKENS)
        for text, length in zip(texts, packed.lengths.tolist(), strict=True):
            if length == 2:
                raise ValueError(f"the text {text!r} has no token: every text to be scored needs a word")
        return packed

    def score_pixels(self, pixels: Tensor, texts: PackedTexts) -> MatchScores:
        """Score one batch of images after the evaluation transform, float [images, 3, image_size, image_size].

        `texts` start with the token that the matching head is to see; cosines always see [CLS].
        """
        model = self.model
        texts = texts.to(model.vision.cls_token.device)
        itm, itc = torch.empty(0, len(texts)), torch.empty(0, len(texts))
        with evaluating(model):
            for image_embeds in encode_images(model, [pixels]):
                text_features = model.text_features(texts.with_first(model.config.tokens.cls))
                itc = (model.image_features(image_embeds) @ text_features.T).cpu()
                itm = self._matched(image_embeds, texts).cpu()
        return MatchScores(itm, itc)

    def _matched(self, image_embeds: Tensor, texts: PackedTexts) -> Tensor:
        """Matching probability [images, texts]; an image's keys and values are projected once for all its texts."""
        images, device = len(image_embeds), image_embeds.device
        image_kv = self.model.stack("encoder").image_kv(image_embeds)
        columns = []
        for some in torch.arange(len(texts), device=device).split(max(1, MAX_PAIRS // images)):
            text_images = torch.arange(images, device=device).repeat_interleave(len(some))
            logits = self.model.match_logits(texts.select(some.repeat(images)), text_images, image_kv)
            columns.append(logits.softmax(-1)[:, 1].view(images, len(some)))
        return torch.cat(columns, dim=1)
