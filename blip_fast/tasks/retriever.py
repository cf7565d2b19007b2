"""Image-text retrieval: cosines for all pairs, the matching head for the best of each direction (BLIP section 5.1).

The published evaluation re-ranks direction by direction and encodes an image's keys and values again for every text.
Here the candidates of both directions are united and walked image by image: an image's keys and values are projected
once and all its candidate texts, packed, read them together.

Memory holds features, k candidates of each query and one block of cosines, never images × texts; embeds of candidate
images wait in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Literal

import torch
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.candidates import EmbedsFile, RunningTopK
from blip_fast.tasks.matcher import Matcher, match_pairs, text_features
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixel_batches
from blip_fast.tasks.ranking import NOT_CANDIDATE, Ranking, RetrievalResult

Directions = Literal["both", "text_to_image"]
KEPT_COSINES = 256  # candidates of each query where nothing is re-ranked
BLOCK_IMAGES = 256  # images whose cosines with all texts exist at a time …
BLOCK_PAIRS = 1 << 24  # … or as many as have so many of them (64 MB)


def retrieve(model: BlipModel, images: Tensor | Iterable[Tensor], texts: PackedTexts, top_k: int = 256, *,
             first_token: str = "[ENC]", directions: Directions = "both",
             progress: Callable[[int, int], None] | None = None) -> RetrievalResult:
    """Find the best texts of every image and the best images of every text.

    Args:
        model: one with a text encoder, the projections and, for `top_k` > 0, the matching head.
        images: float [images, 3, size, size], or batches of them in order, read once.
        texts: the texts; their first tokens are replaced: [CLS] for cosines, `first_token` for matching.
        top_k: how many candidates the matching head re-ranks, of each image and of each text, all where there are
            fewer (published: 256 for COCO, 128 for Flickr30k). 0 leaves them in the order of their cosines.
        first_token: what a text starts with before the matching head: `[ENC]` as in training and in the published
            retrieval evaluation, `[CLS]` as in the published inference code.
        directions: `text_to_image` leaves texts for images out: then only images among the candidates so far are
            kept, and a stream of any length takes no more memory or disk.
        progress: told, while re-ranking, how many pairs are done and how many there are.

    Raises:
        ValueError: there is no image or no text, `top_k` is negative, another first token or direction, or the model
            lacks a head.
        OSError: the disk has no room for the candidates' embeds.
    """
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: give the number of candidates to re-rank, or 0 for cosines alone")
    token_ids = {"[CLS]": model.config.tokens.cls, "[ENC]": model.config.tokens.enc}
    if first_token not in token_ids:
        raise ValueError(f"first_token is {first_token!r}: the matching head reads one of {', '.join(token_ids)}")
    if directions not in ("both", "text_to_image"):
        raise ValueError(f"directions is {directions!r}: choose both or text_to_image")
    texts = texts.to(model.vision.cls_token.device)
    with evaluating(model), closing(EmbedsFile()) as embeds:
        found = _Candidates(text_features(model, texts), top_k or KEPT_COSINES, directions == "both",
                            embeds if top_k else None)
        for batch in encode_images(model, images):
            found.add(model.image_features(batch), batch)
        found.close_block()
        if found.images == 0 or len(texts) == 0:
            raise ValueError(f"retrieval needs images and texts, got {found.images} and {len(texts)}")
        if top_k == 0:
            return found.by_cosine()
        pairs, of_candidate = found.pairs().unique(return_inverse=True)
        pairs = torch.stack([pairs // len(texts), pairs % len(texts)], dim=1)
        logits = match_pairs(model, embeds.read, texts.with_first(token_ids[first_token]), pairs, progress)
    return found.by_matching(logits[:, 1][of_candidate], len(pairs))


class _Candidates:
    """What the first walk leaves: candidates by cosine, and their images' embeds in a file where they are wanted."""

    def __init__(self, features: Tensor, k: int, both: bool, embeds: EmbedsFile | None) -> None:
        self.features, self.k, self.embeds = features, k, embeds
        self.images = 0
        self._waiting: list[Tensor] = []  # features of the block's images
        self._block = max(1, min(BLOCK_IMAGES, BLOCK_PAIRS // max(len(features), 1)))
        self._of_text = RunningTopK(len(features), k, features.device)
        self._of_image: list[tuple[Tensor, Tensor]] | None = [] if both else None  # (cosines, texts) of each block

    def add(self, features: Tensor, embeds: Tensor) -> None:
        """The next images' contrastive features [n, embed_dim] and embeds [n, tokens, width]."""
        if self.embeds is not None:
            for image, own in enumerate(embeds, self.images):
                self.embeds.write(image, own)
        self._waiting.append(features)
        self.images += len(features)
        if sum(map(len, self._waiting)) >= self._block:
            self.close_block()

    def close_block(self) -> None:
        """Hold the images that wait against all texts."""
        if not self._waiting or len(self.features) == 0:
            return
        block = torch.cat(self._waiting)
        self._waiting = []
        cosines = block @ self.features.T
        self._of_text.add(cosines.T, torch.arange(self.images - len(block), self.images, device=block.device))
        if self._of_image is not None:
            self._of_image.append(cosines.topk(min(self.k, cosines.shape[1]), dim=1))
        elif self.embeds is not None:
            self.embeds.keep(self._of_text.items.unique().tolist())

    def pairs(self) -> Tensor:
        """image × texts + text of every candidate, those of images first, int64."""
        texts = len(self.features)
        every_text = torch.arange(texts, device=self.features.device)[:, None]
        of_text = self._of_text.items * texts + every_text
        if self._of_image is None:
            return of_text.flatten()
        of_image = torch.cat([items for _, items in self._of_image])
        every_image = torch.arange(self.images, device=self.features.device)[:, None]
        return torch.cat([(every_image * texts + of_image).flatten(), of_text.flatten()])

    def by_cosine(self) -> RetrievalResult:
        of_image = None
        if self._of_image is not None:
            cosines, items = (torch.cat(parts) for parts in zip(*self._of_image, strict=True))
            of_image = Ranking(items.cpu(), cosines.cpu(), len(self.features), cosines[:, -1].cpu())
        cosines = self._of_text.scores.cpu()
        return RetrievalResult(of_image, Ranking(self._of_text.items.cpu(), cosines, self.images, cosines[:, -1]), 0)

    def by_matching(self, logits: Tensor, pairs: int) -> RetrievalResult:
        """With the matching head's logits of the candidates in the order of `pairs`."""
        of_image = None
        if self._of_image is not None:
            cosines, items = (torch.cat(parts) for parts in zip(*self._of_image, strict=True))
            of_image = _reranked(items, cosines + logits[: items.numel()].view_as(items), len(self.features))
            logits = logits[items.numel() :]
        items = self._of_text.items
        return RetrievalResult(of_image, _reranked(items, self._of_text.scores + logits.view_as(items), self.images),
                               pairs)


def _reranked(items: Tensor, scores: Tensor, gallery: int) -> Ranking:
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Ranking(items.gather(1, order).cpu(), scores.cpu(), gallery, torch.full((len(items),), NOT_CANDIDATE))


class Retriever(PretrainedTask):
    """Finds texts for images and images for texts.

    `Retriever.from_pretrained("Salesforce/blip-itm-base-coco")(["a.jpg", "b.jpg"], ["a dog"], top_k=16)`.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model lacks the matching head or the contrastive projections."""
        super().__init__(model, tokenizer)
        self._matcher = Matcher(model, tokenizer)

    def __call__(self, images: ImageSource | Iterable[ImageSource], texts: str | Iterable[str], top_k: int = 256, *,
                 first_token: str = "[ENC]", directions: Directions = "both", batch_size: int = 16,
                 progress: Callable[[int, int], None] | None = None) -> RetrievalResult:
        """As `retrieve`, of images in any form that `load_image` takes, one or a stream of them, and of texts as they
        are (the published evaluation cleans them: `clean_caption`), at most 35 tokens of each.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError, OSError: as `retrieve`; a text has no token.
        """
        packed = self._matcher.pack([texts] if isinstance(texts, str) else list(texts))
        sources = images if isinstance(images, Iterator) else as_sources(images)  # a stream is never held whole
        batches = pixel_batches(sources, self.model.config.vision.image_size, batch_size)
        return retrieve(self.model, batches, packed, top_k, first_token=first_token, directions=directions,
                        progress=progress)
