"""How well texts describe images: the matching head's probability and the contrastive cosine (BLIP section 3.2)."""

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
# Texts that pass the stack together. On a CPU their states are to stay in its caches: at base size, bfloat16, 32 texts
# took 16 ms each where 192 together took 23; whether texts of one length stand together made no difference.
CPU_TEXTS, GPU_TEXTS = 32, 512
MAX_IMAGES = 16  # images whose keys and values exist at a time (base, 384 px, float32: 42 MB each)


@dataclass(frozen=True, eq=False)
class MatchScores:
    """Scores of images with texts, float32 on the CPU: [images, texts] of every image with every text, or [pairs]."""

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
        return MatchScores(torch.cat([empty, *(s.itm for s in scores)]), torch.cat([empty, *(s.itc for s in scores)]))

    def pack(self, texts: Sequence[str], first_token: str = "[CLS]") -> PackedTexts:
        """Texts → at most 35 tokens each, packed. Raises ValueError naming a text that has no token of its own."""
        packed = self.tokenizer.pack(texts, first_token, MAX_TOKENS)
        for text, length in zip(texts, packed.lengths.tolist(), strict=True):
            if length == 2:
                raise ValueError(f"the text {text!r} has no token: every text to be scored needs a word")
        return packed

    def score_pixels(self, pixels: Tensor, texts: PackedTexts) -> MatchScores:
        """Score one batch of images after the evaluation transform, float [images, 3, image_size, image_size], with
        every text: scores [images, texts].

        `texts` start with the token that the matching head is to see; cosines always see [CLS].
        """
        return self._score_all(pixels, texts, self._text_features(texts))

    def score_pairs(self, pixels: Tensor, texts: PackedTexts, image_of_text: Tensor) -> MatchScores:
        """As `score_pixels`, each text with one image alone, the one that `image_of_text` (int64 [texts], never
        falling) names: scores [texts]."""
        pairs = torch.stack([image_of_text, torch.arange(len(texts))], dim=1)
        image_features, itm = self._match(pixels, texts, pairs)
        features = image_features[image_of_text.to(image_features.device)]
        return MatchScores(itm, (features * self._text_features(texts)).sum(dim=1).cpu())

    def _score_all(self, pixels: Tensor, texts: PackedTexts, text_features: Tensor) -> MatchScores:
        pairs = torch.cartesian_prod(torch.arange(len(pixels)), torch.arange(len(texts)))
        image_features, itm = self._match(pixels, texts, pairs)
        return MatchScores(itm.view(len(pixels), len(texts)), (image_features @ text_features.T).cpu())

    def _match(self, pixels: Tensor, texts: PackedTexts, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive features [images, embed_dim] of the images, and matching probabilities [pairs] on the CPU."""
        model = self.model
        with evaluating(model):
            for embeds in encode_images(model, [pixels]):
                logits = match_pairs(model, embeds.__getitem__, texts.to(embeds.device), pairs.to(embeds.device))
                return model.image_features(embeds), logits.softmax(-1)[:, 1].cpu()
        return torch.empty(0, model.config.embed_dim, device=model.vision.cls_token.device), torch.empty(0)

    def _text_features(self, texts: PackedTexts) -> Tensor:
        with evaluating(self.model):
            return text_features(self.model, texts)


def text_features(model: BlipModel, texts: PackedTexts) -> Tensor:
    """Contrastive features [texts, embed_dim] of any number of texts, on the model's device; their first tokens are
    replaced by [CLS]. For use within `evaluating`."""
    texts = texts.to(model.vision.cls_token.device).with_first(model.config.tokens.cls)
    every = torch.arange(len(texts), device=texts.device)
    some = every.split(texts_at_a_time(texts.device))
    return torch.cat([torch.empty(0, model.config.embed_dim, device=texts.device),
                      *(model.text_features(texts.select(few)) for few in some if len(few))])


def image_of_each(texts: Sequence[Sequence[str]]) -> Tensor:
    """Texts of images, image after image → int64 [texts], the image of each."""
    return torch.tensor([image for image, mine in enumerate(texts) for _ in mine], dtype=torch.int64)


def texts_at_a_time(device: torch.device) -> int:
    return CPU_TEXTS if device.type == "cpu" else GPU_TEXTS


def match_pairs(model: BlipModel, image_embeds: Callable[[Tensor], Tensor], texts: PackedTexts, pairs: Tensor,
                progress: Callable[[int, int], None] | None = None) -> Tensor:
    """ITM logits (not matched, matched) of many pairs, image by image: an image's keys and values are projected once
    and all its texts, packed, read them together. For use within `evaluating`.

    Args:
        image_embeds: given the numbers of a few images, int64 [n], returns what `encode_images` made of them
            [n, tokens, vision width]; each image is asked for once.
        texts: on the model's device, first tokens as the matching head is to see them.
        pairs: int64 [pairs, 2] of (image, text) on the model's device, sorted by image.
        progress: told how many pairs are done and how many there are.

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
    """(images, how many pairs each has): images up to MAX_IMAGES and `most` pairs, one image at least."""
    images, counts = image_of_pair.unique_consecutive(return_counts=True)
    first, pairs = 0, 0
    for last, count in enumerate(counts.tolist()):
        if last > first and (last - first == MAX_IMAGES or pairs + count > most):
            yield images[first:last], counts[first:last]
            first, pairs = last, 0
        pairs += count
    if len(images):
        yield images[first:], counts[first:]
