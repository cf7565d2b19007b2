"""What a run's log says of its speed: rates of the steps since the last row."""

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
        recipe: the run's.
        config: of the model as it is trained, with its tokenizer's vocabulary.
        batches: what this rank reads from.
    """

    def __init__(self, recipe: Recipe, config: BlipConfig, batches: Collection[Batches], device: torch.device) -> None:
        self._recipe, self._config, self._batches = recipe, config, batches
        gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        # `step_work` knows the FLOPs of no other task.
        self._peak = gpu.peak(recipe.runtime.precision) if gpu and recipe.objective.of_pairs else None
        self._begin()

    def step(self, language_only: bool) -> None:
        """Count an optimiser step; `language_only` ones compute LM alone."""
        self._steps, self._language_only = self._steps + 1, self._language_only + language_only

    def row(self) -> dict[str, float]:
        """Rates of the steps counted since the last call; all ranks' together but for `data_wait` and `mfu`."""
        seconds, pairs = time.perf_counter() - self._since, self._pairs(self._steps)
        text, waited = self._tokens() - self._tokens_before, self._waited() - self._waited_before
        ranks = collectives.world()[1]
        row = {"pairs_per_second": ranks * pairs / seconds,
               "tokens_per_second": ranks * (pairs * self._config.vision.tokens + text) / seconds,
               "data_wait": waited / self._steps}
        if self._peak:
            row["mfu"] = self._flops(text / pairs) / seconds / self._peak
        self._begin()
        return row

    def _begin(self) -> None:
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
        """Of this rank's steps; blocks computed a second time are no model FLOPs."""
        objective, pairs = self._recipe.objective, self._recipe.runtime.batch_size
        batch = BatchSizes(pairs, pairs * caption_tokens)
        alone = dataclasses.replace(objective, losses=("lm",))
        total = 0.0
        for losses, steps in ((objective, self._steps - self._language_only), (alone, self._language_only)):
            work = step_work(self._config, losses, batch) if steps else None
            total += (work.forward + work.backward) * self._pairs(steps) / pairs if work else 0.0
        return total
