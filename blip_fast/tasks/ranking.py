"""The result of a retrieval: each query's best candidates with scores, stored sparsely, and recalls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip_fast.metrics.recall import chance_recalls, median_rank, recalls, right_ranks

NOT_CANDIDATE = -100.0  # the published score of pairs that were not re-ranked


@dataclass(frozen=True, eq=False)
class Ranking:
    """Each query's candidates, best first, on the CPU: `items`, int64 [queries, candidates], are places in
    the gallery; `scores`, float32, has the same shape. No other item of the `gallery` scores above
    `elsewhere` [queries]."""

    items: Tensor
    scores: Tensor
    gallery: int
    elsewhere: Tensor

    def dense(self) -> Tensor:
        """Scores [queries, gallery] as in the published evaluation: −100 unless a pair is a candidate."""
        scores = torch.full((len(self.items), self.gallery), NOT_CANDIDATE)
        return scores.scatter_(1, self.items, self.scores)

    def ranks(self, right: Tensor, rights: Tensor) -> Tensor:
        """`right_ranks` of the queries. `right`, bool [queries, candidates], marks the right candidates;
        `rights`, int64 [queries], counts the right items in the gallery."""
        return right_ranks(self.scores, right, rights, self.gallery, self.elsewhere)


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Texts found for images, and images found for texts. The first is None if only the second was requested.

    A score is ITM's 'matched' logit + the cosine; without re-ranking, the cosine alone. `pairs` is the number
    of pairs that the matching head scored.
    """

    image_to_text: Ranking | None
    text_to_image: Ranking
    pairs: int

    def recalls(self, image_of_text: Tensor) -> dict[str, float]:
        """`i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, …, from 0 to 1. Ties count against the model.

        image_of_text: int64 [texts], the image that each text describes. Every image needs a text.
        """
        named = {}
        for direction, ranks in self._ranks(image_of_text).items():
            named |= _recall_entries(direction, recalls(ranks))
        return named

    def median_ranks(self, image_of_text: Tensor) -> dict[str, float]:
        """`i2t_median_rank` and `t2i_median_rank` of the best right item, where 1 is best; otherwise as
        `recalls`. An item that was no candidate of a query counts with the last rank that it may have."""
        return {f"{direction}_median_rank": median_rank(ranks)
                for direction, ranks in self._ranks(image_of_text).items()}

    def _ranks(self, image_of_text: Tensor) -> dict[str, Tensor]:
        """The queries' `right_ranks` for each direction."""
        image_of_text = self._validate(image_of_text)
        named = {}
        if (found := self.image_to_text) is not None:
            right = image_of_text[found.items] == torch.arange(len(found.items))[:, None]
            named["i2t"] = found.ranks(right, image_of_text.bincount(minlength=len(found.items)))
        found = self.text_to_image
        named["t2i"] = found.ranks(found.items == image_of_text[:, None], torch.ones_like(image_of_text))
        return named

    def chances(self, image_of_text: Tensor) -> dict[str, float]:
        """The recalls of a random order, with the same keys as `recalls`."""
        image_of_text = self._validate(image_of_text)
        images, texts = self.text_to_image.gallery, len(image_of_text)
        named = _recall_entries("t2i", chance_recalls(torch.ones_like(image_of_text), images))
        if self.image_to_text is None:
            return named
        return _recall_entries("i2t", chance_recalls(image_of_text.bincount(minlength=images), texts)) | named

    def _validate(self, image_of_text: Tensor) -> Tensor:
        """`image_of_text` on the CPU. Raises ValueError if it does not fit this result."""
        texts, images = len(self.text_to_image.items), self.text_to_image.gallery
        if len(image_of_text) != texts:
            raise ValueError(f"image_of_text names {len(image_of_text)} images for {texts} texts: one "
                             "each is needed")
        image_of_text = image_of_text.cpu()
        if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
            raise ValueError(f"image_of_text runs from {int(image_of_text.min())} to "
                             f"{int(image_of_text.max())}, but there are {images} images")
        return image_of_text


def _recall_entries(direction: str, values: dict[int, float]) -> dict[str, float]:
    return {f"{direction}_r{k}": value for k, value in values.items()}
