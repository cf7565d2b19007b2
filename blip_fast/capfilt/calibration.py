"""Finds a filter's threshold from clean pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from blip_fast.capfilt.clean import match_scores
from blip_fast.capfilt.quality import calibrated_threshold
from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.model_loading import pixel_batches

BATCH = 100  # images


def calibrate(matcher: Matcher, images: Sequence[AnnotatedImage], keep: float,
              first_token: str = "[ENC]") -> float:
    """The threshold that keeps the share `keep` of the images' captions (see `calibrated_threshold`).

    Args:
        first_token: the token that texts start with for the matching head, as in `CapFiltConfig`.

    Raises:
        ImageError: for the first image that cannot be read.
        ValueError: there is no caption, `keep` is not a share, or the first token is unknown.
    """
    left, probabilities = iter(images), []
    for pixels in pixel_batches(images, matcher.model.config.vision.image_size, BATCH):
        texts = [image.captions for image in islice(left, len(pixels))]
        probabilities += match_scores(matcher, pixels, texts, first_token).itm.tolist()
    return calibrated_threshold(probabilities, keep)
