"""The speeds in a run's log: rates over the steps since the last row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection

import torch

from blip_fast.model.config import BlipConfig
from blip_train import collectives
from blip_train.engine.batches import Batches
from blip_train.forecast.gpus import gpu_of
from blip_train.forecast.step_costs import BatchSizes, step_work
from blip_train.recipe import Recipe


class Meter:
    """Counts steps from row to row.

    Args:
        recipe: the run's recipe.
        config: the trained model's, with its tokenizer's vocabulary.
        batches: what this rank reads from.
    """

    def __init__(self, recipe: Recipe, config: BlipConfig, batches: Collection[Batches],
                 device: torch.device) -> None:
        self._recipe, self._config, self._batches = recipe, config, batches
        gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        # `step_work` knows the FLOPs of no other step.
        self._peak = gpu.peak(recipe.runtime.precision) if gpu and recipe.step_kind.of_pairs else None
        self._reset()

    def step(self, language_only: bool) -> None:
        """Count an optimiser step; those that are `language_only` compute LM alone."""
        self._steps, self._language_only = self._steps + 1, self._language_only + language_only

    def row(self) -> dict[str, float]:
        """Rates over the steps since the last call: of all ranks together, except `data_wait` and `mfu`."""
        seconds, pairs = time.perf_counter() - self._since, self._pairs(self._steps)
        text, waited = self._tokens() - self._tokens_before, self._waited() - self._waited_before
        ranks = collectives.world()[1]
        row = {"pairs_per_second": ranks * pairs / seconds,
               "tokens_per_second": ranks * (pairs * self._config.vision.tokens + text) / seconds,
               "data_wait": waited / self._steps}
        if self._peak:
            row["mfu"] = self._flops(text / pairs) / seconds / self._peak
        self._reset()
        return row

    def _reset(self) -> None:
        self._steps = self._language_only = 0
        self._since = time.perf_counter()
        self._waited_before, self._tokens_before = self._waited(), self._tokens()

    def _waited(self) -> float:
        return sum(each.waited for each in self._batches)

    def _tokens(self) -> int:
        return sum(each.tokens for each in self._batches)

    def _pairs(self, steps: int) -> int:
        return steps * self._recipe.runtime.batch_size * self._recipe.runtime.accumulation

    def _flops(self, caption_tokens: float) -> float:
        """FLOPs of this rank's steps. Recomputing blocks does not count as model FLOPs."""
        objective, pairs = self._recipe.objective, self._recipe.runtime.batch_size
        batch = BatchSizes(pairs, pairs * caption_tokens)
        alone = dataclasses.replace(objective, losses=("lm",))
        total = 0.0
        for losses, steps in ((objective, self._steps - self._language_only), (alone, self._language_only)):
            work = step_work(self._config, losses, batch) if steps else None
            total += (work.forward + work.backward) * self._pairs(steps) / pairs if work else 0.0
        return total
