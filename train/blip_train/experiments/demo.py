"""BLIP's whole method in minutes, on drawn scenes: pre-train on noisy pairs, fine-tune a captioner
and a filter, clean the noisy pairs with them (CapFilt), and measure everything on scenes with
combinations never seen in training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from blip_fast.capfilt.calibration import calibrate
from blip_fast.capfilt.clean import CapFiltConfig, CapFiltResult, WebBatch, capfilt
from blip_fast.capfilt.quality import FilterQuality, filter_quality
from blip_fast.data.shards.annotated import AnnotatedImage, annotated_images
from blip_fast.evaluation import CaptionEvaluation, evaluate_captions, evaluate_retrieval
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import evaluation_transform
from blip_fast.scenes.scenes import write_scenes
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.ranking import RetrievalResult
from blip_train.launch import carry_out
from blip_train.prepare import source_folder
from blip_train.recipe import Recipe, load_recipe

STAGES = ("pretrain", "captioner", "filter")
CLEANED = 2000  # noisy pairs that CapFilt filters
CALIBRATION = 500  # clean pairs, in no training set, that set the filter's threshold
KEPT = 0.97  # share of them that passes it
CALIBRATION_SEED = 2  # training scenes have the recipes' seeds, 0 and 1
BATCH = 100
CAPTIONING = GenerationConfig(beams=3, max_length=24, min_length=5)


@dataclass(frozen=True)
class DemoResult:
    """The demo's measurements, and what its report shows."""

    recipes: dict[str, Recipe]
    test: list[AnnotatedImage]
    captions_before: CaptionEvaluation
    captions: CaptionEvaluation
    captions_bfloat16: list[str]
    retrieval_before: RetrievalResult
    retrieval: RetrievalResult
    image_of_text: torch.Tensor
    web: list[AnnotatedImage]
    threshold: float
    cleaned: CapFiltResult
    quality: FilterQuality
    seconds: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of `metrics.json`, shares from 0 to 1, with chance levels if there are any."""
        recalls, chances = self.retrieval.recalls(self.image_of_text), self.retrieval.chances(self.image_of_text)
        slots, quality = self.captions.slots, self.quality
        assert slots is not None  # every test image is a drawn scene
        same = [a == b for a, b in zip(self.captions.captions, self.captions_bfloat16, strict=True)]
        return {
            "retrieval_i2t_r1": recalls["i2t_r1"], "retrieval_t2i_r1": recalls["t2i_r1"],
            "caption_slot_accuracy": slots.slot_accuracy, "caption_exact_match": slots.exact_match,
            "caption_same_in_bfloat16": sum(same) / len(same),
            "capfilt_precision": quality.removal_precision, "capfilt_recall": quality.removal_recall,
            "seconds": round(sum(self.seconds.values()), 1),
            "chance_retrieval_i2t_r1": chances["i2t_r1"], "chance_retrieval_t2i_r1": chances["t2i_r1"],
            "chance_caption_slot_accuracy": slots.chance_slot_accuracy,
            "chance_caption_exact_match": slots.chance_exact_match,
            "chance_capfilt_precision": quality.chance_removal_precision,
            "chance_capfilt_recall": quality.chance_removal_recall,
        }


def demo(directory: Path, pretrain: str = "scenes.yaml") -> DemoResult:
    """Run all stages into `directory` (replacing an earlier demo) and write its `metrics.json`.

    Args:
        directory: for the three runs, the report and the metrics.
        pretrain: the pre-training recipe, one of `blip_train/recipes`.

    Raises:
        ValueError: the directory holds something other than a demo.
    """
    _clear(directory)
    recipes, seconds = _recipes(directory, pretrain), {}
    for stage in STAGES:
        started = time.perf_counter()
        carry_out(recipes[stage])
        seconds[stage] = time.perf_counter() - started
    started = time.perf_counter()
    measured = _measure(recipes)
    result = DemoResult(recipes=recipes, seconds=seconds | {"evaluation": time.perf_counter() - started},
                        **measured)
    result.cleaned.write_jsonl(directory / "capfilt.jsonl")
    (directory / "metrics.json").write_text(json.dumps(result.metrics, indent=2) + "\n")
    return result


def _clear(directory: Path) -> None:
    """Remove an earlier demo and nothing else."""
    if directory.exists() and any(directory.iterdir()) and not (directory / STAGES[0]).is_dir():
        raise ValueError(f"{directory} holds files that are not a demo's: name another directory with "
                         "--output")
    for stage in STAGES:
        shutil.rmtree(directory / stage, ignore_errors=True)
    for name in ("metrics.json", "report.html", "capfilt.jsonl"):
        (directory / name).unlink(missing_ok=True)


def _recipes(directory: Path, pretrain: str) -> dict[str, Recipe]:
    """The three recipes, with runs in `directory`. Both fine-tunings start from the pre-trained model."""
    folder = files("blip_train") / "recipes"
    start = f"--init={directory / STAGES[0] / 'model'}"
    names = {"pretrain": pretrain, "captioner": "scenes_captioner.yaml", "filter": "scenes_filter.yaml"}
    recipes = {stage: load_recipe(Path(str(folder / name)), [f"--name={stage}", f"--runs={directory}",
                                                            *([] if stage == "pretrain" else [start])])
               for stage, name in names.items()}
    size = recipes["pretrain"].model.vision.image_size
    # The demo measures only once, at its end, on one test set.
    return {stage: dataclasses.replace(
        recipe, evaluation=dataclasses.replace(recipe.evaluation, images=0),
        model=dataclasses.replace(recipe.model,
                                  vision=dataclasses.replace(recipe.model.vision, image_size=size)))
        for stage, recipe in recipes.items()}


def _measure(recipes: dict[str, Recipe]) -> dict:
    """Measure captions and retrieval on held-out scenes before and after fine-tuning,
    then CapFilt on noisy pairs."""
    pretrain, models = recipes["pretrain"], {stage: recipes[stage].directory / "model" for stage in STAGES}
    test = annotated_images(source_folder(pretrain, "test"), None)
    # Figures are computed in float32 on any machine; captions in bfloat16 are compared with them.
    before, captioner = (Captioner.from_pretrained(models[stage], dtype="float32")
                         for stage in ("pretrain", "captioner"))
    in_bfloat16 = Captioner.from_pretrained(models["captioner"], dtype="bfloat16")
    matcher = Matcher.from_pretrained(models["filter"], dtype="float32")
    prompt, rerank = recipes["captioner"].data.prompt.strip(), recipes["filter"].evaluation.rerank
    retrieval_before, image_of_text = evaluate_retrieval(before.model, before.tokenizer, test, top_k=rerank)
    retrieval, _ = evaluate_retrieval(matcher.model, matcher.tokenizer, test, top_k=rerank)
    web = annotated_images(source_folder(pretrain, "train"), None)[:CLEANED]
    image_size = pretrain.model.vision.image_size
    threshold = _threshold(matcher, pretrain.directory / "scenes" / "calibration", image_size)
    cleaned = capfilt(captioner, matcher, _batches(web, image_size),
                      CapFiltConfig(prompt=prompt, threshold=threshold))
    kept = [row.kept for row in cleaned.of_origin("web")]
    return {
        "test": test, "image_of_text": image_of_text, "retrieval_before": retrieval_before,
        "retrieval": retrieval, "captions_before": evaluate_captions(before, test, CAPTIONING, prompt=""),
        "captions": evaluate_captions(captioner, test, CAPTIONING, prompt=prompt),
        "captions_bfloat16": [caption.caption for caption in in_bfloat16(
            [image.load() for image in test], prompt, CAPTIONING, strip_prompt=True)],
        "web": web, "threshold": threshold, "cleaned": cleaned,
        "quality": filter_quality(kept, [image.row["caption_is_right"] for image in web]),
    }


def _threshold(matcher: Matcher, folder: Path, image_size: int) -> float:
    """The filter's threshold, from clean scenes that it has not seen."""
    write_scenes(folder, CALIBRATION, "train", CALIBRATION_SEED, 0.0, image_size)
    return calibrate(matcher, annotated_images(folder, None), KEPT)


def _batches(images: list[AnnotatedImage], image_size: int) -> Iterator[WebBatch]:
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        yield WebBatch([image.name for image in part],
                       evaluation_transform([i.load() for i in part], image_size),
                       [image.captions for image in part])
