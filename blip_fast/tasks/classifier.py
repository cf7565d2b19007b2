"""Zero-shot classification: the labels of a list that fit an image, by contrastive features of prompts for
each label.

p(label | image) = softmax over labels of cos(image, label) / τ, with the model's temperature τ (ITC, BLIP
section 3.2). A label's feature is the mean of its prompts' unit vectors, normalised again (CLIP, Radford et
al. 2021, section 3.1.4). BLIP's paper does not evaluate classification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageError, ImageSource, name_of, unless_error
from blip_fast.model.blip import BlipModel
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.parallel.read_ahead import read_ahead
from blip_fast.tasks.matcher import MAX_TOKENS, text_features
from blip_fast.tasks.model_loading import PretrainedTask, as_sources, pixels_or_error

TEMPLATES = ("a picture of a {}", "a photo of a {}", "there is a {} in the picture")
TOP_K, BATCH = 5, 16


@dataclass(frozen=True)
class ScoredLabel:
    """One of an image's likeliest labels."""

    label: str
    probability: float  # among all labels of the list
    itc: float  # cosine of the image's and the label's features, −1 to 1


@dataclass(frozen=True)
class Classified:
    """One image: its path or name, or "image PLACE", and its labels, the likeliest first, or its error."""

    image: str
    result: list[ScoredLabel] | ImageError


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels and their features: unit vectors [labels, embed_dim], float32 on the model's device."""

    names: tuple[str, ...]
    features: Tensor


class Classifier(PretrainedTask):
    """Finds the likeliest of a list of labels for images, with a contrastive checkpoint such as
    `Salesforce/blip-itm-base-coco`.

    Examples:
        >>> classifier = Classifier.from_pretrained(checkpoint)
        >>> [best] = classifier(photo, ["dog", "cat", "horse"], top_k=2)
        >>> len(best), best[0].probability >= best[1].probability
        (2, True)
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model has no contrastive projections."""
        if not model.config.contrastive:
            raise ValueError("this model has no contrastive head: take an image-text retrieval or "
                             "pre-training checkpoint")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Iterable[ImageSource], labels: Sequence[str], *,
                 templates: Sequence[str] = TEMPLATES, top_k: int = TOP_K,
                 batch_size: int = BATCH) -> list[list[ScoredLabel]]:
        """The `top_k` likeliest labels (or all, if there are fewer) of each of one or many images, the
        likeliest first.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: as `labels` and `stream`.
        """
        stream = self.stream(as_sources(images), self.labels(labels, templates), top_k=top_k,
                             batch_size=batch_size)
        return [unless_error(classified.result) for classified in stream]

    def labels(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Labels:
        """Encode a list of labels, once for all images.

        Args:
            templates: prompts with `{}` in place of the label.

        Raises:
            ValueError: no label, a duplicate, or one without a token; no template, or one without `{}`.
        """
        if not labels or not templates:
            raise ValueError("classification needs a label and a template at least")
        if missing := [template for template in templates if "{}" not in template]:
            raise ValueError(f"the template {missing[0]!r} has no {{}} for the label")
        if len(set(labels)) < len(labels):
            twice = next(label for place, label in enumerate(labels) if label in labels[:place])
            raise ValueError(f"the label {twice!r} is there twice: it would share its probability "
                             "with itself")
        for label in labels:
            if len(self.tokenizer.encode(label)) == 2:
                raise ValueError(f"the label {label!r} has no token: every label needs a word")
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        with evaluating(self.model):
            features = text_features(self.model, self.tokenizer.pack(prompts, "[CLS]", MAX_TOKENS))
        mean = features.view(len(labels), len(templates), -1).mean(dim=1)
        return Labels(tuple(labels), F.normalize(mean, dim=-1))

    def classify_pixels(self, pixels: Tensor, labels: Labels, top_k: int = TOP_K) -> list[list[ScoredLabel]]:
        """Classify images after the evaluation transform, float [images, 3, image_size, image_size].

        Raises ValueError if `top_k` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        with evaluating(self.model):
            batches = [self.model.image_features(embeds) for embeds in encode_images(self.model, pixels)]
            cosines = torch.cat([labels.features[:0], *batches]) @ labels.features.T
            probabilities = (cosines / self.model.temperature.float()).softmax(dim=-1)
            best = probabilities.topk(min(top_k, len(labels.names)))
        per_image = zip(best.indices.tolist(), best.values.tolist(), cosines.gather(1, best.indices).tolist(),
                        strict=True)
        return [[ScoredLabel(labels.names[place], *scores) for place, *scores in zip(*image, strict=True)]
                for image in per_image]

    def stream(self, images: Iterable[ImageSource], labels: Labels, *, top_k: int = TOP_K,
               batch_size: int = BATCH) -> Iterator[Classified]:
        """Classify any number of images in bounded memory, in order. Threads read images ahead of the model.

        Raises:
            ValueError: `top_k` or `batch_size` is less than 1. It is raised by the call itself.
        """
        if min(top_k, batch_size) < 1:
            raise ValueError(f"top_k and batch_size must be at least 1, got {top_k} and {batch_size}")
        return self._classify_all(images, labels, top_k, batch_size)

    def _classify_all(self, images: Iterable[ImageSource], labels: Labels, top_k: int,
                      batch_size: int) -> Iterator[Classified]:
        size = self.model.config.vision.image_size

        def read(numbered: tuple[int, ImageSource]) -> tuple[str, Tensor | ImageError]:
            name = name_of(numbered[1], f"image {numbered[0]}")
            return name, pixels_or_error(numbered[1], size, name)

        reads = (seen for _, seen in read_ahead(enumerate(images), read))
        while batch := list(islice(reads, batch_size)):
            pixels = [seen for _, seen in batch if isinstance(seen, Tensor)]
            found = iter(self.classify_pixels(torch.stack(pixels), labels, top_k) if pixels else ())
            for name, seen in batch:
                yield Classified(name, seen if isinstance(seen, ImageError) else next(found))
