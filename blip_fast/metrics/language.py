"""How well a decoder predicts held-out captions, in nats per token, and the baselines without image and
context."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream

VOCABULARY_ROWS = 1024  # token rows whose logits over the vocabulary exist at a time


def caption_loss(model: BlipModel, images: Tensor | Iterable[Tensor], texts: PackedTexts,
                 image_of_text: Tensor, prompt_tokens: int = 1) -> float:
    """Mean cross-entropy of the captions' tokens, [SEP] included, without label smoothing, in nats per token.

    Args:
        model: one with a decoder.
        images: float [images, 3, size, size], or batches of them in order.
        texts: captions with their [SEP]; the first token of each is replaced by [DEC].
        image_of_text: int64 [texts], the image of each caption.
        prompt_tokens: the number of leading tokens without loss: [DEC], and the prompt's tokens if texts
            begin with one.

    Raises:
        ValueError: an image index is out of range, or no token carries a loss.
    """
    decoder = model.stack("decoder")
    device = model.vision.cls_token.device
    texts = texts.to(device).with_first(model.config.tokens.bos)
    image_of_text = image_of_text.to(device)
    total, count, first = 0.0, 0, 0
    with evaluating(model):
        for embeds in encode_images(model, images):
            mine = ((image_of_text >= first) & (image_of_text < first + len(embeds))).nonzero()[:, 0]
            if len(mine):
                stream = TextStream(texts.select(mine).without_last(), "decoder", image_of_text[mine] - first)
                (hidden,) = decoder([stream], decoder.image_kv(embeds))
                losses = _token_losses(model, hidden, texts.select(mine), prompt_tokens)
                total, count = total + float(losses.sum()), count + len(losses)
            first += len(embeds)
    _check_images(image_of_text, first)
    if count == 0:
        raise ValueError(f"no token carries a loss: there are {len(texts)} captions with {prompt_tokens} "
                         "prompt tokens")
    return total / count


def _token_losses(model: BlipModel, hidden: Tensor, texts: PackedTexts, prompt_tokens: int) -> Tensor:
    """Cross-entropy of each target token, float64. `hidden` is decoder states [rows, width] of
    `texts.without_last()`."""
    is_target = _target_mask(texts, prompt_tokens)
    chunks = zip(hidden[is_target].split(VOCABULARY_ROWS),
                 target_tokens(texts, prompt_tokens).split(VOCABULARY_ROWS), strict=True)
    return torch.cat([F.cross_entropy(model.vocabulary_logits(rows), targets, reduction="none").double()
                      for rows, targets in chunks])


def target_tokens(texts: PackedTexts, prompt_tokens: int = 1) -> Tensor:
    """The tokens that a decoder has to predict, int64 [targets]: all but the first `prompt_tokens` of each
    text."""
    return texts.without_first().token_ids[_target_mask(texts, prompt_tokens)]


def _target_mask(texts: PackedTexts, prompt_tokens: int) -> Tensor:
    """Which tokens of `texts.without_first()` are targets, bool [rows]."""
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens is {prompt_tokens}: [DEC] is never predicted, so it is 1 at least")
    return texts.without_first().positions() + 1 >= prompt_tokens


def unigram_entropy(texts: PackedTexts, prompt_tokens: int = 1) -> float:
    """Entropy of the texts' own token frequencies, in nats per token. No model without image and context can
    do better."""
    counts = target_tokens(texts, prompt_tokens).bincount().double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def unigram_cross_entropy(train: PackedTexts, test: PackedTexts, vocab_size: int,
                          prompt_tokens: int = 1) -> float:
    """Nats per token of `test` under the token frequencies of `train`, add-one smoothed over the
    vocabulary."""
    counts = target_tokens(train, prompt_tokens).bincount(minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[target_tokens(test, prompt_tokens)].mean())


def _check_images(image_of_text: Tensor, images: int) -> None:
    if len(image_of_text) and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise ValueError(f"image_of_text runs from {int(image_of_text.min())} to {int(image_of_text.max())}, "
                         f"but there are {images} images")
