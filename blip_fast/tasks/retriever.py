"""Image-text retrieval: cosines for all pairs, the matching head for the best (BLIP section 5.1).

The published evaluation re-ranks one direction after the other, and projects an image's keys and values again
for every text. Here the candidates of both directions are merged and processed image by image: an image's
keys and values are projected once, and all its candidate texts read them together.

Memory holds the features, k candidates per query and one block of cosines, never images × texts. The embeds
of candidate images are stored in a file.
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
KEPT_COSINES = 256  # candidates per query when nothing is re-ranked
# A block of cosines has at most so many images and (unless it is a single image) so many pairs (64 MB).
BLOCK_IMAGES = 256
BLOCK_PAIRS = 1 << 24


def retrieve(model: BlipModel, images: Tensor | Iterable[Tensor], texts: PackedTexts, top_k: int = 256, *,
             first_token: str = "[ENC]", directions: Directions = "both",
             progress: Callable[[int, int], None] | None = None) -> RetrievalResult:
    """Find the best texts of every image and the best images of every text.

    Args:
        model: one with a text encoder, the projections and, for `top_k` > 0, the matching head.
        images: float [images, 3, size, size], or an iterable of such batches, which is read once.
        texts: their first tokens are replaced: by [CLS] for cosines, by `first_token` for matching.
        top_k: how many candidates of each image and of each text the matching head re-ranks, or all if there
            are fewer (published: 256 for COCO, 128 for Flickr30k). With 0 candidates stay in the order of
            their cosines.
        first_token: the first token of a text for the matching head: `[ENC]` as in training and in the
            published retrieval evaluation, `[CLS]` as in the published inference code.
        directions: `text_to_image` skips finding texts for images. Then only images among the current
            candidates are kept, and memory and disk do not grow with the number of images.
        progress: called during re-ranking with the number of pairs done and their total.

    Raises:
        ValueError: there is no image or no text; `top_k` is negative; another first token or direction; the
            model lacks a head.
        OSError: the disk has no room for the candidates' embeds.
    """
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: give the number of candidates to re-rank, or 0 for "
                         "cosines alone")
    token_ids = {"[CLS]": model.config.tokens.cls, "[ENC]": model.config.tokens.enc}
    if first_token not in token_ids:
        raise ValueError(f"first_token is {first_token!r}: the matching head reads one of "
                         f"{', '.join(token_ids)}")
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
    """The result of the first pass: candidates by cosine and, for re-ranking, their embeds in a file."""

    def __init__(self, features: Tensor, k: int, both: bool, embeds: EmbedsFile | None) -> None:
        self.features, self.k, self.embeds = features, k, embeds
        self.images = 0
        self._waiting: list[Tensor] = []  # features of the current block's images
        self._block = max(1, min(BLOCK_IMAGES, BLOCK_PAIRS // max(len(features), 1)))
        self._of_text = RunningTopK(len(features), k, features.device)
        # (cosines, texts) of each block.
        self._of_image: list[tuple[Tensor, Tensor]] | None = [] if both else None

    def add(self, features: Tensor, embeds: Tensor) -> None:
        """Add the next images: contrastive features [n, embed_dim] and embeds [n, tokens, width]."""
        if self.embeds is not None:
            for image, own in enumerate(embeds, self.images):
                self.embeds.write(image, own)
        self._waiting.append(features)
        self.images += len(features)
        if sum(map(len, self._waiting)) >= self._block:
            self.close_block()

    def close_block(self) -> None:
        """Compare the waiting images with all texts."""
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
        """Every candidate pair as image × (number of texts) + text, int64; images' candidates first."""
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
        of_text = Ranking(self._of_text.items.cpu(), cosines, self.images, cosines[:, -1])
        return RetrievalResult(of_image, of_text, 0)

    def by_matching(self, logits: Tensor, pairs: int) -> RetrievalResult:
        """The result, given the matching head's logits of the candidates in the order of `pairs`."""
        of_image = None
        if self._of_image is not None:
            cosines, items = (torch.cat(parts) for parts in zip(*self._of_image, strict=True))
            of_image = _best_first(items, cosines + logits[: items.numel()].view_as(items),
                                   len(self.features))
            logits = logits[items.numel() :]
        items = self._of_text.items
        of_text = _best_first(items, self._of_text.scores + logits.view_as(items), self.images)
        return RetrievalResult(of_image, of_text, pairs)


def _best_first(items: Tensor, scores: Tensor, gallery: int) -> Ranking:
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Ranking(items.gather(1, order).cpu(), scores.cpu(), gallery,
                   torch.full((len(items),), NOT_CANDIDATE))


class Retriever(PretrainedTask):
    """Finds texts for images and images for texts, with a retrieval checkpoint such as
    `Salesforce/blip-itm-base-coco`.

    Examples:
        >>> retriever = Retriever.from_pretrained(checkpoint)
        >>> found = retriever(photos, ["a dog on grass", "two people", "a red ball"], top_k=2)
        >>> found.text_to_image.items.shape  # for each text its best images
        torch.Size([3, 2])
        >>> sorted(found.recalls(torch.tensor([0, 1, 1])))  # if the second image had two of the texts
        ['i2t_r1', 'i2t_r10', 'i2t_r5', 't2i_r1', 't2i_r10', 't2i_r5']
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model has no matching head or no contrastive projections."""
        super().__init__(model, tokenizer)
        self._matcher = Matcher(model, tokenizer)

    def __call__(self, images: ImageSource | Iterable[ImageSource], texts: str | Iterable[str],
                 top_k: int = 256, *, first_token: str = "[ENC]", directions: Directions = "both",
                 batch_size: int = 16, progress: Callable[[int, int], None] | None = None) -> RetrievalResult:
        """`retrieve` for images in any form that `load_image` takes: one, a sequence, or an iterator of any
        length. Texts are used as they are (the published evaluation cleans them: `clean_caption`), at most 35
        tokens of each.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError, OSError: as `retrieve`; a text has no token.
        """
        packed = self._matcher.pack([texts] if isinstance(texts, str) else list(texts))
        sources = images if isinstance(images, Iterator) else as_sources(images)  # never collect an iterator
        batches = pixel_batches(sources, self.model.config.vision.image_size, batch_size)
        return retrieve(self.model, batches, packed, top_k, first_token=first_token, directions=directions,
                        progress=progress)
