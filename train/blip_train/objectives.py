"""BLIP's three losses as functions of tensors (section 3.2): ITC, ITM's negatives, LM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def positive_targets(ids: Tensor, key_ids: Tensor) -> Tensor:
    """Targets by id equality: each row's weight shared equally among the keys of its id (retrieval fine-tuning).

    Args:
        ids: int64 [batch].
        key_ids: int64 [keys], the batch's own ids first; a slot that was never filled holds `IGNORED`.

    Returns:
        [batch, keys], rows sum to one.
    """
    equal = (ids[:, None] == key_ids[None, :]).float()
    return equal / equal.sum(dim=1, keepdim=True)


def contrastive_loss(queries: Tensor, momentum_queries: Tensor, keys: Tensor, positives: Tensor, temperature: Tensor,
                     alpha: float) -> Tensor:
    """One direction of ITC: −Σ target · log softmax(queries · keys / τ), mean over the batch.

    target = α · softmax(momentum_queries · keys / τ) + (1 − α) · positives, with no gradient.

    Args:
        queries: [batch, embed_dim], unit rows.
        momentum_queries: [batch, embed_dim], the momentum encoder's.
        keys: [keys, embed_dim] momentum features of the other modality: the batch's, then the queue's.
        positives: [batch, keys], rows sum to one.
        temperature: τ, a scalar with a gradient.
        alpha: share of the soft targets.
    """
    with torch.no_grad():
        soft = torch.softmax(momentum_queries @ keys.T / temperature, dim=1)
        targets = alpha * soft + (1.0 - alpha) * positives
    logits = queries @ keys.T / temperature
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def negative_weights(similarities: Tensor, excluded: Tensor, floor: float) -> Tensor:
    """Probability weights of hard negatives: softmax(similarities) + floor, 0 where excluded.

    Args:
        similarities: [rows, candidates], already divided by τ.
        excluded: bool [rows, candidates], the own pair or every pair of the same id.
        floor: 1e-4 in pre-training, 0 in retrieval fine-tuning.
    """
    return (torch.softmax(similarities, dim=1) + floor).masked_fill(excluded, 0.0)


@torch.no_grad()
def draw_negatives(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One candidate per row, drawn in proportion to `weights` [rows, candidates] → int64 [rows].

    A row without any admissible candidate gets −1: its pair is left out of the matching loss.
    """
    admissible = weights.sum(dim=1) > 0
    drawn = torch.multinomial(torch.where(admissible[:, None], weights, 1.0), 1, generator=generator).squeeze(1)
    return torch.where(admissible, drawn, -1)


def language_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, mean over targets that are not `IGNORED`.

    Args:
        logits: [rows, vocab_size].
        targets: int64 [rows].
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=label_smoothing)
