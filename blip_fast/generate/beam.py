"""Beam search under two rules of scoring and stopping (`GenerationConfig.beam_rule`), over slots of
images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip_fast.generate.generation_config import GenerationConfig
from blip_fast.generate.texts import Texts, adjust, enter, no_texts


@dataclass(frozen=True)
class Beams(Texts):
    """The running texts of each image, best first, and its best finished texts so far."""

    finished: Tensor  # int64 [slots, beams, max_length], [SEP] after the end
    scores: Tensor  # [slots, beams], best first; −∞ where nothing has finished yet


class BeamSearch:
    """Each step ranks the 2 × beams best continuations of an image's running texts. Those that end with [SEP]
    are finished if they are among the first `beams`; the best `beams` others run on."""

    def __init__(self, config: GenerationConfig, sep_id: int) -> None:
        self.config, self.sep_id = config, sep_id

    def empty(self, slots: int, device: torch.device) -> Beams:
        texts = no_texts(slots, self.config, device)
        return Beams(**texts, finished=texts["token_ids"].clone(), scores=texts["sums"].clone())

    def enter(self, beams: Beams, slot: int, prompt: Sequence[int], seed: int) -> None:
        """Begin an image: its prompt is the first text, the others are impossible. The seed is not used."""
        enter(beams, slot, prompt)
        beams.sums[slot, 1:] = beams.scores[slot] = -torch.inf

    def advance(self, beams: Beams, logits: Tensor) -> Beams:
        """One step by next-token `logits`, float32 [slots, beams, vocab_size]."""
        config = self.config
        ranked = self._rank(beams, logits)
        before, lengths = beams.lengths, ranked.lengths
        ends = ranked.token_ids.take_along_dim(before[:, None, None], 2).squeeze(2) == self.sep_id
        run_on = ends.int().argsort(dim=1, stable=True)[:, : config.beams]  # the best that do not end
        running = replace(ranked, token_ids=ranked.token_ids.take_along_dim(run_on[..., None], 1),
                          sums=ranked.sums.take_along_dim(run_on, 1),
                          parents=ranked.parents.take_along_dim(run_on, 1))

        last, authors = lengths == config.max_length, config.beam_rule == "authors"
        divisors = config.score_divisors(lengths, beams.prompt_lengths, ended=True)[:, None]
        finishes = ends if authors else ends | last[:, None]
        best = slice(config.beams)
        finished_scores = (ranked.sums / divisors).masked_fill(~finishes, -torch.inf)
        running = self._finish(running, ranked.token_ids[:, best], finished_scores[:, best])

        # Both rules assume that no better text can come once the best sum, scored at the present length, is
        # no better than the worst finished score. The authors take the best of all continuations,
        # transformers 5 the best of those that run on.
        best_sum = (ranked if authors else running).sums[:, :1]
        done = running.done | (best_sum / divisors <= running.scores[:, -1:]).squeeze(1)
        running = replace(running, done=done)
        if authors:  # the last step also finishes texts without [SEP], unless the image is done
            whole = config.score_divisors(lengths, beams.prompt_lengths, ended=False)[:, None]
            running = self._finish(running, running.token_ids,
                                   (running.sums / whole).masked_fill(~last[:, None], -torch.inf))
        return replace(running, done=done | last)

    def results(self, beams: Beams, slot: int) -> tuple[Tensor, Tensor]:
        """The best texts of a slot: ids int64 [n_best, max_length] and scores [n_best], −∞ where there is
        none."""
        best = slice(self.config.n_best)
        return beams.finished[slot, best], beams.scores[slot, best]

    def _rank(self, beams: Beams, logits: Tensor) -> Beams:
        """The 2 × beams best continuations of each image, best first, each with the text that it
        continues."""
        most = 2 * self.config.beams
        # The best of all are among the best of each.
        log_probs, tokens = adjust(logits.log_softmax(-1), beams, self.config, self.sep_id).topk(most)
        sums, index = (log_probs + beams.sums[..., None]).flatten(1).topk(most)
        parents = index // most
        token_ids = beams.token_ids.take_along_dim(parents[..., None], 1)
        end = beams.lengths[:, None, None].expand(-1, most, 1)
        token_ids = token_ids.scatter(2, end, tokens.flatten(1).take_along_dim(index, 1)[..., None])
        return replace(beams, token_ids=token_ids, lengths=beams.lengths + 1, sums=sums, parents=parents)

    def _finish(self, beams: Beams, token_ids: Tensor, scores: Tensor) -> Beams:
        """Keep the best of the finished texts and of these [slots, n, max_length]. An image that is done
        keeps what it has."""
        after_end = torch.arange(token_ids.shape[2], device=token_ids.device) >= beams.lengths[:, None, None]
        scores = torch.cat([beams.scores, scores.masked_fill(beams.done[:, None], -torch.inf)], dim=1)
        texts = torch.cat([beams.finished, token_ids.masked_fill(after_end, self.sep_id)], dim=1)
        scores, best = scores.topk(beams.scores.shape[1])
        return replace(beams, finished=texts.take_along_dim(best[..., None], 1), scores=scores)
