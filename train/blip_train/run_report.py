"""The end of a run: how good the model is on the test split, as `metrics.json` and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from blip_fast.data.shards.annotated import AnnotatedImage, annotated_images
from blip_fast.evaluation import CaptionEvaluation, evaluate_captions, evaluate_retrieval
from blip_fast.generate import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.report.page import Card, Line, Metric, Report
from blip_fast.report.plot import Plot
from blip_fast.scenes.scenes import scene_from_slots, score_caption
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.model_loading import load_for_task
from blip_train.logs.run_log import read_log
from blip_train.prepare import source_folder
from blip_train.recipe import Recipe
from blip_train.steps.table import LOSSES

MAX_LENGTH, MIN_LENGTH = 24, 5  # tokens of a caption in the report


def write_run_report(recipe: Recipe, model: Path) -> dict[str, float]:
    """Evaluate an exported model on the recipe's test split; write `metrics.json` and
    `report.html` into the run's directory.

    Args:
        recipe: the run. At most `evaluation.images` test images are used; with 0 nothing is evaluated.
        model: the exported model's directory.

    Returns:
        The metrics: `i2t_r1`, … for models with ITC and ITM; for models with a decoder `caption_loss`,
        `unigram_entropy`, `unigram_cross_entropy` and, on scenes, `slot_accuracy` and `exact_match`.
    """
    report = Report(f"Training run {recipe.name}",
                    "Losses on the way, and the model on images that it has never seen.",
                    facts={"seed": str(recipe.seed), "ranks": str(recipe.runtime.ranks),
                           "precision": recipe.runtime.precision,
                           "ZeRO stage": str(recipe.runtime.zero_stage)})
    report.section("Losses").plots(loss_plots(recipe.directory / "log.jsonl"))
    metrics: dict[str, float] = {}
    if recipe.evaluation.images:
        loaded, tokenizer = load_for_task(model, dtype="float32")
        images = test_images(recipe)
        if loaded.config.has_encoder and loaded.config.matching:
            metrics |= _retrieval(report, recipe, loaded, tokenizer, images)
        if loaded.config.has_decoder:
            metrics |= _captions(report, recipe, Captioner(loaded, tokenizer), images)
        (recipe.directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report.write(recipe.directory / "report.html")
    return metrics


def loss_plots(log: Path) -> list[Plot]:
    """One plot per loss, from a run's `log.jsonl`."""
    series = {name: read_log(log, name) for name in LOSSES}
    return [Plot(LOSSES[name].title, {name.upper(): points}) for name, points in series.items() if points]


def test_images(recipe: Recipe) -> list[AnnotatedImage]:
    """The first `evaluation.images` images of the test split."""
    split = recipe.data.test_split if recipe.data.root is not None else None
    return annotated_images(source_folder(recipe, "test"), split)[: recipe.evaluation.images]


def caption_cards(images: Sequence[AnnotatedImage], captions: Sequence[str]) -> list[Card]:
    """Pictures, each with the model's caption and a reference; marked right or
    wrong where the truth is known."""
    cards = []
    for image, caption in zip(images, captions, strict=True):
        right = score_caption(caption, scene_from_slots(image.row["scene"]))[2] if "scene" in image.row else None
        cards.append(Card(image.load(),
                          [Line(caption, "model", right=right), Line(image.captions[0], "reference")]))
    return cards


def retrieval_metrics(recalls: dict[str, float], chances: dict[str, float]) -> list[Metric]:
    directions = {"i2t": "image → text", "t2i": "text → image"}
    return [Metric(f"{directions[name[:3]]} R@{name[5:]}", value, chance=chances[name])
            for name, value in recalls.items()]


def named_metrics(values: Mapping[str, float], names: Mapping[str, tuple[str, float]]) -> list[Metric]:
    """The values that `names` gives a title and a target, each with its chance
    level, `chance_NAME`, if known."""
    return [Metric(title, values[name], target=target, chance=values.get(f"chance_{name}"))
            for name, (title, target) in names.items()]


def _retrieval(report: Report, recipe: Recipe, model: BlipModel, tokenizer: Tokenizer,
               images: list[AnnotatedImage]) -> dict[str, float]:
    result, image_of_text = evaluate_retrieval(model, tokenizer, images, top_k=recipe.evaluation.rerank)
    recalls, chances = result.recalls(image_of_text), result.chances(image_of_text)
    reranked = f"ITC, then ITM over the best {recipe.evaluation.rerank} of each" if recipe.evaluation.rerank else "ITC"
    report.section("Retrieval", f"{len(images)} images, {len(image_of_text)} texts; {reranked}.").metrics(
        retrieval_metrics(recalls, chances))
    return recalls


def _captions(report: Report, recipe: Recipe, captioner: Captioner,
              images: list[AnnotatedImage]) -> dict[str, float]:
    generation = GenerationConfig(beams=recipe.evaluation.beams, max_length=MAX_LENGTH, min_length=MIN_LENGTH)
    split = recipe.data.train_split if recipe.data.root is not None else None
    train = [caption for image in annotated_images(source_folder(recipe, "train"), split)
             for caption in image.captions]
    torch.manual_seed(recipe.seed)
    result = evaluate_captions(captioner, images, generation, prompt=recipe.data.prompt, train_captions=train)
    shown = recipe.evaluation.captions
    report.section("Captions", "Written for images of the test split.").metrics(_caption_metrics(result))
    report.cards(caption_cards(images[:shown], result.captions[:shown]))
    metrics = {"caption_loss": result.loss, "unigram_entropy": result.unigram_entropy}
    if result.unigram_cross_entropy is not None:
        metrics["unigram_cross_entropy"] = result.unigram_cross_entropy
    if result.slots is not None:
        metrics |= {"slot_accuracy": result.slots.slot_accuracy, "exact_match": result.slots.exact_match}
    return metrics


def _caption_metrics(result: CaptionEvaluation) -> list[Metric]:
    metrics = [Metric("held-out captions, loss and unigram entropy", result.loss,
                      chance=result.unigram_entropy, unit="nats per token", lower_is_better=True)]
    if result.slots is not None:
        slots = result.slots
        metrics += [Metric("caption slots right", slots.slot_accuracy, chance=slots.chance_slot_accuracy),
                    Metric("whole captions right", slots.exact_match, chance=slots.chance_exact_match)]
    return metrics
