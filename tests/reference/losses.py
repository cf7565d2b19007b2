"""The three losses of BLIP (BLIP section 3.2), and the weights that hard negatives are drawn with.

B rows of this rank, K keys (batch and queue), N candidates for negatives, d projection width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_positives(rows: int, keys: int) -> Tensor:
    """One-hot targets [B, K] of pre-training: row i's only positive is key i of its own batch."""
    return torch.eye(rows, keys)


def equal_id_positives(ids: Tensor, key_ids: Tensor) -> Tensor:
    """Targets [B, K] of retrieval fine-tuning: shared equally among all keys of the row's id."""
    equal = (ids[:, None] == key_ids[None, :]).float()
    return equal / equal.sum(dim=1, keepdim=True)


def contrastive_loss(
    query: Tensor,  # [B, d]
    momentum_query: Tensor,  # [B, d], no gradient
    keys: Tensor,  # [K, d], no gradient: momentum features of this batch, then the queue
    positives: Tensor,  # [B, K]
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """One direction of ITC: mean over rows of -sum target * log softmax(query · keys / temperature),
    with target = alpha * softmax(momentum query · keys / temperature) + (1 - alpha) * positives."""
    with torch.no_grad():
        soft = (momentum_query @ keys.T / temperature).softmax(dim=1)
        targets = alpha * soft + (1 - alpha) * positives
    log_probs = (query @ keys.T / temperature).log_softmax(dim=1)
    return -(targets * log_probs).sum(dim=1).mean()


def pretraining_negative_weights(similarities: Tensor) -> Tensor:
    """softmax + 1e-4, never the row's own pair. Similarities [B, B] are divided by the temperature already."""
    weights = similarities.softmax(dim=1) + 1e-4
    return weights.fill_diagonal_(0)


def fine_tuning_negative_weights(similarities: Tensor, ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """softmax, never a pair of equal id. Similarities [B, N] are divided by the temperature already."""
    return similarities.softmax(dim=1).masked_fill(ids[:, None] == candidate_ids[None, :], 0)


def matching_loss(logits: Tensor) -> Tensor:
    """Two-way cross-entropy over [3B, 2] logits: B positives (label 1), then 2B negatives (label 0)."""
    pairs = len(logits) // 3
    log_probs = logits.log_softmax(dim=1)
    return -(log_probs[:pairs, 1].sum() + log_probs[pairs:, 0].sum()) / (3 * pairs)


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Label-smoothed cross-entropy of the next token [B, L - 1]; 0 where the target is -100.

    logits [B, L, V] at position i predict targets [B, L] at position i + 1. The smoothed target puts 1 - smoothing
    on the right token and spreads smoothing evenly over the whole vocabulary.
    """
    log_probs = logits[:, :-1].log_softmax(dim=-1)
    targets = targets[:, 1:]
    right = log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    losses = -(1 - smoothing) * right - smoothing * log_probs.mean(dim=-1)
    return losses * (targets != -100)


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `token_losses` over the tokens that have a target."""
    return token_losses(logits, targets).sum() / (targets[:, 1:] != -100).sum()
