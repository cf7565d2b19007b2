"""The model's part in search: features of images and texts, and how well a text matches its candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.inference.int8 import dense
from blip_fast.media.images import ImageError, StoredImage
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.tasks.model_loading import read_pixels

MAX_IMAGES = 16  # images whose keys and values exist at a time on a GPU


def fingerprint(model: BlipModel) -> str:
    """SHA-256 of a model's sizes and weights, in the dtype that it computes in."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, held in model.state_dict().items():
        tensor = dense(held)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_features(model: BlipModel, pixels: Tensor) -> NDArray[np.float32]:
    """[images, 3, image_size, image_size], at least one → unit vectors [images, embed_dim]."""
    with evaluating(model):
        features = [model.image_features(image_embeds) for image_embeds in encode_images(model, pixels)]
    return torch.cat(features).cpu().numpy()


def text_feature(model: BlipModel, text: PackedTexts) -> NDArray[np.float32]:
    """One text that starts with [CLS] → unit vector [embed_dim]."""
    with evaluating(model):
        return model.text_features(text.to(model.vision.cls_token.device))[0].cpu().numpy()


def match_logits(model: BlipModel, text: PackedTexts,
                 images: Iterable[StoredImage]) -> list[Tensor | ImageError]:
    """ITM's logits [2] (not matched, matched) of one text with each image, or the error if the image cannot
    be read.

    Images are read ahead; only a few are in memory at a time.
    """
    stack, device = model.stack("encoder"), model.vision.cls_token.device
    text = text.to(device)
    pixels = read_pixels(images, model.config.vision.image_size)
    results: list[Tensor | ImageError] = []
    with evaluating(model):
        while batch := list(islice(pixels, 1 if device.type == "cpu" else MAX_IMAGES)):
            readable = [read for read in batch if not isinstance(read, ImageError)]
            logits: list[Tensor] = []
            for image_embeds in encode_images(model, [torch.stack(readable)] if readable else []):
                places = torch.arange(len(image_embeds), device=device)
                texts = text.select(torch.zeros_like(places))
                logits += model.match_logits(texts, places, stack.image_kv(image_embeds)).cpu()
            left = iter(logits)
            results += [read if isinstance(read, ImageError) else next(left) for read in batch]
    return results
