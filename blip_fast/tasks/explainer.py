"""Heat maps of where in an image a text's words are seen: Grad-CAM of cross-attention, as published with
ALBEF and BLIP.

With y the matching head's logit of 'matched' and A the cross-attention weights [heads, tokens, visual tokens]
of one layer of the image-grounded encoder, a token's map is

    mean over heads of A ⊙ max(∂y/∂A, 0),    without [CLS]'s column; the others form the grid of patches

(Selvaraju et al. 2017; Li et al. 2021, "ALBEF"). The attention op returns no weights. Instead, two hooks on
the layer record its queries q and its attention output o = A v. With the image's keys k and values v

    A = softmax(q kᵀ / √head_dim),    ∂y/∂A = ∂y/∂o vᵀ

So the model runs unchanged, and the backward pass stops at that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from blip_fast.inference.cpu_packing import is_packed
from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource, image_pixels
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageKV
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import CrossAttention, TextLayer, TextStream
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.matcher import MAX_TOKENS
from blip_fast.tasks.model_loading import PretrainedTask

PUBLISHED_LAYER = 7 / 12  # the eighth of BLIP's twelve layers; the same fraction in smaller models


@dataclass(frozen=True, eq=False)
class WordMap:
    """A word or phrase of the text, and its map: the mean over its tokens, float32 [grid, grid] on the CPU,
    rows from top to bottom, never negative."""

    word: str
    map: Tensor


@dataclass(frozen=True, eq=False)
class Explanation:
    """The probability that image and text match, and the maps of the whole text and of its words."""

    itm: float
    text: WordMap
    words: list[WordMap]


class Explainer(PretrainedTask):
    """Shows where in an image a text's words are seen, with a matching checkpoint such as
    `Salesforce/blip-itm-base-coco`.

    Examples:
        >>> explainer = Explainer.from_pretrained(checkpoint)
        >>> explanation = explainer(photo, "a red ball")
        >>> [word.word for word in explanation.words]
        ['a', 'red', 'ball']
        >>> explanation.words[2].map.shape == explanation.text.map.shape
        True
    """

    differentiates = True

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model has no matching head, or its layers were packed for the CPU."""
        if not model.config.matching:
            raise ValueError("this model has no matching head: take an image-text retrieval or "
                             "pre-training checkpoint")
        if is_packed(model):
            raise ValueError("this model was packed for inference, and no gradient passes it: load "
                             "it anew, by Explainer.from_pretrained")
        super().__init__(model, tokenizer)

    def __call__(self, image: ImageSource, text: str, words: Sequence[str] = (), *, layer: int | None = None,
                 first_token: str = "[CLS]") -> Explanation:
        """Explain one image by one text, of which at most 35 tokens are read.

        Args:
            words: words or phrases of the text to map, at each of their occurrences; a phrase has one map.
                Default: all words.
            layer: the layer whose cross-attention is used, from 0. Default: the eighth of twelve.
            first_token: `[CLS]` as in transformers and in the published inference code, `[ENC]` as in
                training.

        Raises:
            ImageError: the image cannot be read.
            ValueError: the text has no token, or does not contain one of the words; no such layer; another
                first token.
        """
        ids = self.tokenizer.encode(text, first_token, MAX_TOKENS)
        if len(ids) == 2:
            raise ValueError(f"the text {text!r} has no token: it needs a word")
        places = self.tokenizer.words(text, MAX_TOKENS)
        wanted = [found for word in words for found in self._occurrences(word, text, ids, places)] or places
        pixels = image_pixels(image, self.model.config.vision.image_size)
        logits, maps = self.explain_pixels(pixels, PackedTexts.from_lists([ids]), layer)
        return Explanation(logits.softmax(-1)[0, 1].item(), WordMap(text, maps[1:-1].mean(dim=0)),
                           [WordMap(word, maps[place.start : place.stop].mean(dim=0))
                            for word, place in wanted])

    def explain_pixels(self, pixels: Tensor, texts: PackedTexts,
                       layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Maps of every token of texts about one image, float [3, image_size, image_size] after the
        evaluation transform.

        Returns:
            Logits (not matched, matched) [texts, 2] and maps [rows, grid, grid], float32 on the CPU.

        Raises:
            ValueError: no such layer.
        """
        model = self.model
        layers = model.config.text.layers
        layer = int(PUBLISHED_LAYER * layers) if layer is None else layer
        if not 0 <= layer < layers:
            raise ValueError(f"layer is {layer}: this model's text encoder has layers 0 to {layers - 1}")
        with evaluating(model):
            (embeds,) = encode_images(model, pixels[None])
            image_kv = model.stack("encoder").image_kv(embeds)
            with torch.enable_grad():
                logits, maps = attention_maps(model, texts.to(embeds.device), image_kv, layer)
        grid = model.config.vision.image_size // model.config.vision.patch_size
        return logits.cpu(), maps[:, 1:].unflatten(1, (grid, grid)).cpu()

    def _occurrences(self, word: str, text: str, ids: list[int],
                     places: list[tuple[str, range]]) -> list[tuple[str, range]]:
        """Where the tokens of a word or phrase occur in the text as whole words."""
        pieces = self.tokenizer.encode(word)[1:-1]
        starts, stops = {place.start for _, place in places}, {place.stop for _, place in places}
        found = [(word, range(start, start + len(pieces))) for start in range(1, len(ids) - len(pieces))
                 if pieces and ids[start : start + len(pieces)] == pieces
                 and start in starts and start + len(pieces) in stops]
        if not found:
            raise ValueError(f"the text {text!r} has no word {word!r}: name one of "
                             f"{', '.join(w for w, _ in places)}")
        return found


def attention_maps(model: BlipModel, texts: PackedTexts, image_kv: ImageKV,
                   layer: int) -> tuple[Tensor, Tensor]:
    """ITM logits of texts with one image, [texts, 2], and each token's A ⊙ max(∂y/∂A, 0), mean over heads,
    float32 [rows, visual tokens]. Gradients must be enabled.

    Args:
        image_kv: of one image.
        layer: the layer whose cross-attention is used.
    """
    stack = model.stack("encoder")
    cross_attention = cast(CrossAttention, cast(TextLayer, stack.layers[layer]).cross_attention)
    found: dict[str, Tensor] = {}

    def keep_queries(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["q"] = output.detach()

    def begin_gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found["seen"] = inputs[0].detach().requires_grad_()
        return (found["seen"],)

    hooks = (cross_attention.query[0].register_forward_hook(keep_queries),
             cross_attention.out[0].register_forward_pre_hook(begin_gradients))
    try:
        images = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
        (states,) = stack([TextStream(texts, "encoder", images)], image_kv)
    finally:
        for hook in hooks:
            hook.remove()
    logits = model.itm_head(states.index_select(0, texts.first_rows().long())).float()  # type: ignore[misc]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), found["seen"])
    (keys, values), = image_kv.layer(layer)
    q, gradient = (rows.float().view(len(rows), *keys.shape[1:]) for rows in (found["q"], gradient))
    weights = (torch.einsum("rhd,khd->hrk", q, keys.float()) * keys.shape[-1] ** -0.5).softmax(dim=-1)
    of_weights = torch.einsum("rhd,khd->hrk", gradient, values.float())
    return logits.detach(), (weights * of_weights.clamp(min=0)).mean(dim=0)
