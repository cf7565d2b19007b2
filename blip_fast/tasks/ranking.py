"""What a retrieval found: of each query its best candidates with their scores, kept sparse, and recalls of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.metrics.recall import chance_recalls, median_rank, recalls, right_ranks

NOT_CANDIDATE = -100.0  # the published score of pairs that were not re-ranked


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates of each query, best first, on the CPU: `items` int64 [queries, candidates], places in the gallery, and
    `scores` float32 of the same shape. No other item of the `gallery` scores above `elsewhere` [queries]."""

    items: Tensor
    scores: Tensor
    gallery: int
    elsewhere: Tensor

    def dense(self) -> Tensor:
        """Scores [queries, gallery] as the published evaluation holds them: −100 where a pair was no candidate."""
        scores = torch.full((len(self.items), self.gallery), NOT_CANDIDATE)
        return scores.scatter_(1, self.items, self.scores)

    def ranks(self, right: Tensor, rights: Tensor) -> Tensor:
        """`right_ranks` of the queries, `right` bool [queries, candidates], `rights` int64 [queries] in the gallery."""
        return right_ranks(self.scores, right, rights, self.gallery, self.elsewhere)


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Texts found for images and images for texts; the first is None where only the second was asked for.

    Scores are ITM's 'matched' logit + cosine, without re-ranking the cosine. `pairs` is how many pairs the matching
    head has seen.
    """

    image_to_text: Ranking | None
    text_to_image: Ranking
    pairs: int

    def recalls(self, image_of_text: Tensor) -> dict[str, float]:
        """`i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, …, 0 to 1, ties counted against the model.

        image_of_text: int64 [texts], the image that each text describes. Every image needs a text.
        """
        named = {}
        for direction, ranks in self._ranks(image_of_text).items():
            named |= _named(direction, recalls(ranks))
        return named

    def median_ranks(self, image_of_text: Tensor) -> dict[str, float]:
        """`i2t_median_rank`, `t2i_median_rank` of the best right item, 1 is best; else as `recalls`. Where an item was
        no candidate of a query it counts as the last that it may be."""
        return {f"{direction}_median_rank": median_rank(ranks)
                for direction, ranks in self._ranks(image_of_text).items()}

    def _ranks(self, image_of_text: Tensor) -> dict[str, Tensor]:
        """`right_ranks` of the queries of each direction."""
        image_of_text = self._checked(image_of_text)
        named = {}
        if (found := self.image_to_text) is not None:
            right = image_of_text[found.items] == torch.arange(len(found.items))[:, None]
            named["i2t"] = found.ranks(right, image_of_text.bincount(minlength=len(found.items)))
        found = self.text_to_image
        named["t2i"] = found.ranks(found.items == image_of_text[:, None], torch.ones_like(image_of_text))
        return named

    def chances(self, image_of_text: Tensor) -> dict[str, float]:
        """The recalls of a random order, under the names of `recalls`."""
        image_of_text = self._checked(image_of_text)
        images, texts = self.text_to_image.gallery, len(image_of_text)
        named = _named("t2i", chance_recalls(torch.ones_like(image_of_text), images))
        if self.image_to_text is None:
            return named
        return _named("i2t", chance_recalls(image_of_text.bincount(minlength=images), texts)) | named

    def _checked(self, image_of_text: Tensor) -> Tensor:
        texts, images = len(self.text_to_image.items), self.text_to_image.gallery
        if len(image_of_text) != texts:
            raise ValueError(f"image_of_text names {len(image_of_text)} images for {texts} texts: one each is needed")
        image_of_text = image_of_text.cpu()
        if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
            raise ValueError(f"image_of_text runs from {int(image_of_text.min())} to {int(image_of_text.max())}, but "
                             f"there are {images} images")
        return image_of_text


def _named(direction: str, values: dict[int, float]) -> dict[str, float]:
    return {f"{direction}_r{k}": value for k, value in values.items()}
