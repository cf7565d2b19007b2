"""Captions for images (BLIP section 5.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blip_fast.generate import Generated, GenerationConfig, generate
from blip_fast.images import ImageSource
from blip_fast.inference import encode_images, evaluating
from blip_fast.model import BlipModel
from blip_fast.tasks.loading import PretrainedTask, as_sources, pixel_batches
from blip_fast.tokenizer import Tokenizer

PROMPT = "a picture of"
CAPTIONING = GenerationConfig(beams=3, max_length=20, min_length=5)  # as published for COCO


@dataclass(frozen=True)
class Caption:
    """A caption.

    `caption` is the text of `token_ids` without special tokens, the prompt included unless it was stripped.
    `token_ids` is what transformers' `generate` returns for the image: [DEC], the prompt, the generated tokens and
    [SEP] (none where `max_length` cut the caption off). `score` follows the beam rule of the `GenerationConfig`.
    """

    caption: str
    token_ids: list[int]
    score: float


class Captioner(PretrainedTask):
    """Writes captions. `Captioner.from_pretrained("Salesforce/blip-image-captioning-base")(["photo.jpg"])`."""

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the model has no text decoder."""
        model.stack("decoder")
        super().__init__(model, tokenizer)

    def __call__(self, images: ImageSource | Sequence[ImageSource], prompt: str = PROMPT,
                 generation: GenerationConfig = CAPTIONING, *, strip_prompt: bool = False,
                 batch_size: int = 16) -> list[Caption]:
        """Caption one image or many: paths, encoded bytes, Pillow images or uint8 arrays [height, width, 3].

        Raises ImageError for the first image that cannot be read, ValueError for options that do not fit.
        """
        batches = pixel_batches(as_sources(images), self.model.config.vision.image_size, batch_size)
        return [caption for batch in batches
                for caption in self.caption_pixels(batch, prompt, generation, strip_prompt=strip_prompt)]

    def caption_pixels(self, pixels: Tensor, prompt: str = PROMPT, generation: GenerationConfig = CAPTIONING, *,
                       strip_prompt: bool = False) -> list[Caption]:
        """Caption one batch of images after the evaluation transform, float [images, 3, image_size, image_size].

        Sampling draws from a seed made of `generation.seed` and the image's own pixels, so a caption depends on the
        image alone, never on its batch or its place there.
        """
        prompt_ids = self.prompt_ids(prompt)
        seeds = [_seed(image, generation.seed) for image in pixels] if generation.top_p is not None else None
        texts: list[Generated] = []
        with evaluating(self.model):
            for image_embeds in encode_images(self.model, [pixels]):
                image_kv = self.model.stack("decoder").image_kv(image_embeds)
                texts += generate(self.model, image_kv, [prompt_ids] * len(image_embeds), generation, seeds)
        skipped = len(prompt_ids) if strip_prompt else 0
        return [Caption(self.tokenizer.decode(text.token_ids[skipped:]), text.token_ids, text.score) for text in texts]

    def prompt_ids(self, prompt: str) -> list[int]:
        """[DEC] and the prompt's tokens; "" is no prompt."""
        return [self.model.config.tokens.bos, *self.tokenizer.encode(prompt)[1:-1]]


def _seed(pixels: Tensor, seed: int) -> int:
    content = pixels.cpu().float().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7, salt=seed.to_bytes(8)).digest())
