"""Beam search under two rules of scoring and stopping (`GenerationConfig.beam_rule`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.generate.config import GenerationConfig
from blip_fast.generate.decoder import Decoder, adjust, narrow, unfinished_if_few


@dataclass(frozen=True)
class Beams:
    """The running texts of each image, all of one length and best first, and its best finished texts so far."""

    images: Tensor  # int64 [images]: which of the caller's images
    token_ids: Tensor  # int64 [images, running, length]; one runs at the start, `beams` from then on
    sums: Tensor  # [images, running]: Σ log p
    rows: Tensor  # int64 [images, running]: the decoder's row that each one goes on from
    finished: Tensor  # int64 [images, beams, max_length], [SEP] behind the end
    scores: Tensor  # [images, beams], best first; −∞ where nothing has finished yet
    done: Tensor  # bool [images]: nothing better can come


def beam_search(decoder: Decoder, prompts: Tensor, config: GenerationConfig, sep_id: int) -> tuple[Tensor, Tensor]:
    """The `n_best` texts of each image, best first.

    At each step the 2 × beams best continuations of all running texts are ranked: those that end with [SEP] among the
    first `beams` are finished, the best `beams` others run on.

    Args:
        prompts: int64 [images, prompt length].

    Returns:
        Token ids int64 [images, n_best, max_length], to be read up to the first [SEP] behind the prompt, and scores
        [images, n_best], −∞ where fewer texts were finished.
    """
    images, prompt_length = prompts.shape
    result_ids = prompts.new_empty(images, config.n_best, config.max_length)
    result_scores = torch.empty(images, config.n_best, device=prompts.device)
    beams = _start(prompts, config, sep_id)
    logits = decoder.prefill(prompts)
    for length in range(prompt_length + 1, config.max_length + 1):
        beams = _advance(beams, logits, prompt_length, config, sep_id)
        going_on = unfinished_if_few(beams.done)
        if going_on is not None or length == config.max_length:
            best = slice(config.n_best)
            result_ids[beams.images], result_scores[beams.images] = beams.finished[:, best], beams.scores[:, best]
        if length == config.max_length or (going_on is not None and len(going_on) == 0):
            break
        if going_on is not None:
            beams = narrow(beams, going_on)
            decoder.keep_images(going_on)
        logits = decoder.step(beams.rows.flatten(), beams.token_ids[:, :, -1].flatten())
    return result_ids, result_scores


def _start(prompts: Tensor, config: GenerationConfig, sep_id: int) -> Beams:
    images, device = len(prompts), prompts.device
    index = torch.arange(images, device=device)
    return Beams(
        images=index,
        token_ids=prompts[:, None],
        sums=torch.zeros(images, 1, device=device),
        rows=index[:, None],
        finished=prompts.new_full((images, config.beams, config.max_length), sep_id),
        scores=torch.full((images, config.beams), -torch.inf, device=device),
        done=torch.zeros(images, dtype=torch.bool, device=device),
    )


def _advance(beams: Beams, logits: Tensor, prompt_length: int, config: GenerationConfig, sep_id: int) -> Beams:
    """One step: rank the continuations by next-token `logits` [images × running, vocab_size], finish some, run on."""
    ranked = _rank(beams, logits, config, sep_id)
    ends = ranked.token_ids[:, :, -1] == sep_id
    run_on = ends.int().argsort(dim=1, stable=True)[:, : config.beams]  # the best that do not end
    running = replace(ranked, token_ids=ranked.token_ids.take_along_dim(run_on[..., None], dim=1),
                      sums=ranked.sums.take_along_dim(run_on, dim=1), rows=ranked.rows.take_along_dim(run_on, dim=1))

    length = ranked.token_ids.shape[2]
    last, authors = length == config.max_length, config.beam_rule == "authors"
    divisor = config.score_divisor(length, prompt_length, ended=True)
    finishes = torch.ones_like(ends) if last and not authors else ends
    best = slice(config.beams)
    finished_scores = (ranked.sums / divisor).masked_fill(~finishes, -torch.inf)
    running = _finish(running, ranked.token_ids[:, best], finished_scores[:, best], sep_id)

    # Both rules take it that nothing better can come once the best sum is no better at the present length. The authors
    # look at the best continuation of all, transformers 5 at the best that runs on.
    best_sum = (ranked if authors else running).sums[:, 0]
    running = replace(running, done=running.done | (best_sum / divisor <= running.scores[:, -1]))
    if last and authors:  # texts without [SEP] are finished only if nothing else is certain to be better
        whole = config.score_divisor(length, prompt_length, ended=False)
        running = _finish(running, running.token_ids, running.sums / whole, sep_id)
    return running


def _rank(beams: Beams, logits: Tensor, config: GenerationConfig, sep_id: int) -> Beams:
    """The 2 × beams best continuations of each image, best first, each with the row that it continues."""
    images, running = beams.sums.shape
    log_probs = adjust(logits.log_softmax(-1), beams.token_ids.flatten(0, 1), config, sep_id)
    sums = (log_probs.view(images, running, -1) + beams.sums[..., None]).flatten(1)
    sums, index = sums.topk(2 * config.beams)
    parents, tokens = index // log_probs.shape[1], index % log_probs.shape[1]
    token_ids = torch.cat([beams.token_ids.take_along_dim(parents[..., None], dim=1), tokens[..., None]], dim=2)
    rows = parents + torch.arange(images, device=parents.device)[:, None] * running
    return replace(beams, token_ids=token_ids, sums=sums, rows=rows)


def _finish(beams: Beams, token_ids: Tensor, scores: Tensor, sep_id: int) -> Beams:
    """Keep the best of the finished texts and these [images, n, length], unless an image is done already."""
    scores = torch.cat([beams.scores, scores.masked_fill(beams.done[:, None], -torch.inf)], dim=1)
    padded = F.pad(token_ids, (0, beams.finished.shape[2] - token_ids.shape[2]), value=sep_id)
    scores, best = scores.topk(beams.scores.shape[1])
    finished = torch.cat([beams.finished, padded], dim=1).take_along_dim(best[..., None], dim=1)
    return replace(beams, finished=finished, scores=scores)
