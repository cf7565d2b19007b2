"""The loop's results over its seeds: `metrics.json`, and a page that compares the models pre-trained
on cleaned and on raw pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from blip_fast.data.shards.shards import replace_file
from blip_fast.report.page import Report
from blip_train.experiments.bootstrap import MODELS, Figures
from blip_train.experiments.bootstrap_recipe import ANEW, CAPTIONER, FILTER, PRETRAIN, BootstrapRecipe
from blip_train.run_report import loss_plots

METRICS = "metrics.json"
TARGET = 0.9  # of both shares below
REMOVAL = {"removal_precision": "removed texts that were wrong",
           "removal_recall": "wrong texts that were removed"}
MEASURES = {"i2t_r1": "retrieval R@1, image → text", "t2i_r1": "retrieval R@1, text → image",
            "slot_accuracy": "caption slots right", "exact_match": "whole captions right"}
TITLES = {PRETRAIN: "Pre-training on raw pairs", CAPTIONER: "The captioner", FILTER: "The filter",
          ANEW: "Pre-training on cleaned pairs"}


def summary(figures: Mapping[int, Figures]) -> dict[str, dict[str, float | None]]:
    """Each figure's `mean` over the seeds and its sample standard deviation `sd` (None for one seed)."""
    names = next(iter(figures.values()))
    of_seeds = {name: [mine[name] for mine in figures.values()] for name in names}
    return {name: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}
            for name, values in of_seeds.items()}


def comparison(figures: Mapping[int, Figures]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: a measure, raw, cleaned, chance, and in how
    many seeds cleaned is better."""
    found = summary(figures)
    columns = ["Measure", *MODELS, "chance", "seeds in which cleaned is better"]
    rows = [[title, *(_spread(found[f"{model}_{name}"]) for model in MODELS), _share(found[f"chance_{name}"]["mean"]),
             f"{sum(mine[f'cleaned_{name}'] > mine[f'raw_{name}'] for mine in figures.values())} of "
             f"{len(figures)}"]
            for name, title in MEASURES.items() if f"raw_{name}" in found]
    return columns, rows


def removal(figures: Mapping[int, Figures]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of how well wrong texts were found; no rows if it is not known which are wrong."""
    found = summary(figures)
    rows = [[title, _spread(found[name]), _share(TARGET), _share(found[f"chance_{name}"]["mean"])]
            for name, title in REMOVAL.items() if name in found]
    return ["Removal", "share", "target", "chance"], rows


def write_figures(recipe: BootstrapRecipe, figures: Mapping[int, Figures]) -> Path:
    """Write `metrics.json` (each seed's figures, means and deviations) and
    `report.html`. Returns the page's path."""
    every = {"seeds": {str(seed): mine for seed, mine in figures.items()}, **summary(figures)}
    replace_file(recipe.directory / METRICS, (json.dumps(every, indent=2) + "\n").encode())
    report = Report("Bootstrapped pre-training",
                    "Pre-trained on raw pairs; these cleaned by a captioner and a filter of that model "
                    "(CapFilt); pre-trained anew.",
                    facts={"seeds": ", ".join(map(str, figures)), "cleaned sources": ", ".join(recipe.web)})
    if (table := removal(figures))[1]:
        found = summary(figures)
        report.section("What CapFilt removed",
                       f"Of the texts {_spread(found['right_raw'])} were right before, "
                       f"{_spread(found['right_cleaned'])} after. Examples are on each source's own page, "
                       f"seed-{recipe.seeds[0]}/cleaned/{recipe.web[0]}/report.html and others.").table(*table)
    if (table := comparison(figures))[1]:
        report.section("Raw and cleaned",
                       "The same recipe, steps and seed on both: means over the seeds on held-out images, ± "
                       "the standard deviation.").table(*table)
    report.section("Seed by seed").table(["Figure", *(f"seed {seed}" for seed in figures)], [
        [name, *(mine[name] for mine in figures.values())] for name in next(iter(figures.values()))])
    for stage, title in TITLES.items():
        run = recipe.directory / f"seed-{recipe.seeds[0]}" / stage
        report.section(f"{title}: losses of seed {recipe.seeds[0]}").plots(loss_plots(run / "log.jsonl"))
    return report.write(recipe.directory / "report.html")


def _spread(found: Mapping[str, float | None]) -> str:
    sd = found["sd"]
    return _share(found["mean"]) + ("" if sd is None else f" ± {100 * sd:.1f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
