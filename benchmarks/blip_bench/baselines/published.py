"""Re-ranking and answer ranking as in the published evaluation code, rewritten plainly on transformers'
modules (its port of the same text transformer). Everything is padded, and the image or question is repeated
for every text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NOT_CANDIDATE = -100.0


@torch.no_grad()
def rerank(model: Any, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor, cosines: Tensor, k: int,
           images: Sequence[int], texts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each image its k best texts, then for each text its k best images, one by one.

    Args:
        model: BlipForImageTextRetrieval.
        image_embeds: [all images, tokens, width].
        text_ids, text_mask: int64 [all texts, 35], padded to 35, [ENC] first.
        cosines: float32 [all images, all texts].
        images, texts: the ones to process.

    Returns:
        Scores float32 [all images, all texts] of the loop over images, and of the loop over texts; −100 for
        other pairs.
    """
    of_images, of_texts = torch.full_like(cosines, NOT_CANDIDATE), torch.full_like(cosines, NOT_CANDIDATE)
    for image in images:
        cosine, best = cosines[image].topk(k)
        states = image_embeds[image].repeat(k, 1, 1)
        of_images[image, best] = _matching_logits(model, text_ids[best], text_mask[best], states) + cosine
    for text in texts:
        cosine, best = cosines[:, text].topk(k)
        ids, mask = text_ids[text].repeat(k, 1), text_mask[text].repeat(k, 1)
        of_texts[best, text] = _matching_logits(model, ids, mask, image_embeds[best]) + cosine
    return of_images, of_texts


def _matching_logits(model: Any, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
    """'Matched' logits, float32 [pairs]."""
    everything = torch.ones(states.shape[:2], dtype=torch.int64)
    hidden = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states,
                                encoder_attention_mask=everything).last_hidden_state
    return model.itm_head(hidden[:, 0])[:, 1].float()


@torch.no_grad()
def question_states(model: Any, pixels: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
    """BlipForQuestionAnswering's states [questions, length, width] of padded questions ([ENC] first), each
    with its own image."""
    image_embeds = model.vision_model(pixels.to(model.dtype)).last_hidden_state
    everything = torch.ones(image_embeds.shape[:2], dtype=torch.int64)
    return model.text_encoder(input_ids=question_ids, attention_mask=question_mask,
                              encoder_hidden_states=image_embeds,
                              encoder_attention_mask=everything).last_hidden_state


@torch.no_grad()
def rank_answers(model: Any, states: Tensor, question_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor,
                 k: int) -> tuple[Tensor, Tensor]:
    """Each question's k likeliest answers by their first token, scored by their whole likelihood.

    Args:
        model: BlipForQuestionAnswering, its decoder with the published label smoothing.
        answer_ids, answer_mask: int64 [answers, longest], padded with 0, [DEC] first.

    Returns:
        The answers' places, int64 [questions, k], and their scores, float32 [questions, k].
    """
    questions = len(states)
    start = answer_ids[0, 0].repeat(questions, 1)
    first = model.text_decoder(start, encoder_hidden_states=states,
                               encoder_attention_mask=question_mask).logits[:, 0]
    chosen = first.softmax(dim=1)[:, answer_ids[:, 1]].topk(k, dim=1).indices
    ids = answer_ids[chosen].flatten(0, 1)
    losses = model.text_decoder(ids, attention_mask=answer_mask[chosen].flatten(0, 1),
                                encoder_hidden_states=states.repeat_interleave(k, 0),
                                encoder_attention_mask=question_mask.repeat_interleave(k, 0),
                                labels=ids.masked_fill(ids == 0, -100), reduction="none").loss
    return chosen, -losses.view(questions, k).float()
