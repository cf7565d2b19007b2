"""Judges whether a sentence is true of two images (NLVR2; BLIP section 5.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer, clean_caption
from blip_fast.tasks.model_loading import PretrainedTask, pixel_batches

MAX_WORDS = 40  # of a sentence, as published


class Reasoner(PretrainedTask):
    """Judges sentences: `Reasoner.from_pretrained("m")([("left.jpg", "right.jpg")], ["both show a dog"])`."""

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model is not an NLVR2 model."""
        if not (model.config.reasoning and model.config.text.twin_cross_attention):
            raise ValueError("reasoning needs a model that looks at two images, with NLVR2's head: "
                             "take an NLVR2 checkpoint")
        super().__init__(model, tokenizer)

    def __call__(self, pairs: Sequence[tuple[ImageSource, ImageSource]], sentences: Sequence[str], *,
                 batch_size: int = 16) -> Tensor:
        """Judge one sentence about each pair of images.

        Returns:
            The probability that each sentence is true, float32 [pairs] on the CPU.

        Raises:
            ImageError: for the first image that cannot be read.
            ValueError: not one sentence per pair.
        """
        if len(pairs) != len(sentences):
            raise ValueError(f"{len(pairs)} pairs of images but {len(sentences)} sentences: pass one "
                             "sentence per pair")
        texts = self.pack(sentences)
        images = [image for pair in pairs for image in pair]
        found = [torch.empty(0)]
        for batch in pixel_batches(images, self.model.config.vision.image_size, 2 * batch_size):
            start = sum(map(len, found))
            which = torch.arange(start, start + len(batch) // 2)
            found.append(self.judge_pixels(batch.unflatten(0, (-1, 2)), texts.select(which)))
        return torch.cat(found)

    def pack(self, sentences: Sequence[str]) -> PackedTexts:
        """Clean sentences as published, and tokenise them with [ENC] first."""
        return self.tokenizer.pack([clean_caption(sentence, MAX_WORDS) for sentence in sentences], "[ENC]")

    def judge_pixels(self, pixels: Tensor, sentences: PackedTexts) -> Tensor:
        """Judge one batch of pairs, [pairs, 2, 3, image_size, image_size] after the evaluation transform.
        Sentences start with [ENC]."""
        found = torch.empty(0)
        with evaluating(self.model):
            for image_embeds in encode_images(self.model, [pixels.flatten(0, 1)]):
                logits = self.model.pair_logits(image_embeds.unflatten(0, (-1, 2)),
                                                sentences.to(image_embeds.device))
                found = logits.softmax(dim=1)[:, 1].cpu()
        return found
