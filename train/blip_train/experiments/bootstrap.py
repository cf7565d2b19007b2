"""The whole loop of BLIP (section 3.3, figure 3): pre-train, fine-tune a captioner and a filter, clean the
web pairs with them (CapFilt), pre-train anew on what was kept, and measure both pre-trained models.

    runs/NAME/bootstrap.yaml      the recipe
    runs/NAME/seed-N/scenes       the scenes drawn for it, if any
    runs/NAME/seed-N/pretrain …   one run per training stage: captioner, filter, bootstrapped
    runs/NAME/seed-N/cleaned/WEB  CapFilt's output for each web source
    runs/NAME/metrics.json        the figures of all seeds; report.html

Each stage is a process of `blip-fast train` or `blip-fast capfilt`, which frees its memory at the end and
continues where it was interrupted.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from blip_fast.capfilt.calibration import calibrate
from blip_fast.capfilt.folder import DROPPED
from blip_fast.capfilt.quality import filter_quality
from blip_fast.command_line.model_options import model_options
from blip_fast.data.shards.annotated import ANNOTATIONS, annotated_images
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import INDEX, iterate, replace_file
from blip_fast.evaluation import evaluate_captions, evaluate_retrieval
from blip_fast.generate import GenerationConfig
from blip_fast.inference.precision import resolve
from blip_fast.parallel.signals import Stopped, exit_status, sigterm_interrupts
from blip_fast.scenes.scenes import scene_from_slots, score_caption, write_scenes
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.model_loading import chosen_device
from blip_train.checkpoint.checkpoints import whole
from blip_train.experiments.bootstrap_recipe import (
    ANEW,
    CAPTIONER,
    CLEANED,
    FILTER,
    PRETRAIN,
    SCENES,
    BootstrapRecipe,
    Calibration,
    Loop,
    capfilt_options,
    plan,
)
from blip_train.prepare import EXPORT
from blip_train.recipe import Recipe
from blip_train.run_report import MAX_LENGTH, MIN_LENGTH

RECIPE, STAGE = "bootstrap.yaml", "stage.yaml"  # the loop's recipe, and a training stage's in its folder
# Files in the folders that they describe.
DATA, THRESHOLD, MEASURED = "data.json", "threshold.json", "measured.json"
TRAINED = "report.html"  # the last file that a run writes
ONE_OBJECT = {"train": 0.15, "test": 0.0}  # share of scenes with one object; no two test captions are alike
MODELS = {"raw": PRETRAIN, "cleaned": ANEW}  # the pairs that the two pre-trained models learnt from

Figures = dict[str, float]


def bootstrap(recipe: BootstrapRecipe, resume: bool = False) -> dict[int, Figures]:
    """Carry out the loop for every seed.

    Args:
        resume: continue what `runs/NAME` holds; finished stages are not repeated.

    Returns:
        Each seed's figures (see `measure`).

    Raises:
        ValueError, FileNotFoundError, OSError: as `plan`; or `runs/NAME` exists and `resume` is not set, or a
            stage's recipe has changed. Raised before anything starts.
        SystemExit: a stage failed, and has printed why, or was stopped by a signal.
    """
    recipe = _with_precision(recipe, resume)
    loops = plan(recipe)
    for loop in loops:
        _check_resumable(loop, resume)
    recipe.directory.mkdir(parents=True, exist_ok=True)
    replace_file(recipe.directory / RECIPE, yaml.safe_dump(asdict(recipe), sort_keys=False).encode())
    return {loop.seed: _carry_out(loop) for loop in loops}


def _with_precision(recipe: BootstrapRecipe, resume: bool) -> BootstrapRecipe:
    """The recipe with the precision of the loop that is resumed, or with what
    `auto` means on this machine."""
    saved = recipe.directory / RECIPE
    if recipe.precision == "auto" and resume and saved.is_file():
        precision = yaml.safe_load(saved.read_text()).get("precision", "auto")
        recipe = replace(recipe, precision=precision)
    return replace(recipe, precision=resolve(recipe.precision, chosen_device(None)))


def _check_resumable(loop: Loop, resume: bool) -> None:
    """Raise ValueError if the run's folder is taken, or a stage in it has another recipe."""
    if (loop.recipe.directory / RECIPE).exists() and not resume:
        raise ValueError(f"{loop.recipe.directory} holds a run already: go on with --resume, or choose "
                         "another --name")
    for stage in loop.stages.values():
        saved = stage.directory / STAGE
        before = yaml.safe_load(saved.read_text()) if saved.is_file() else {}
        now = yaml.safe_load(stage.to_yaml())
        if changed := [key for key in before if before[key] != now[key]]:
            raise ValueError(f"{stage.directory} was begun with another recipe ({', '.join(changed)} "
                             "changed): give the same, choose another --name, or remove it and the later "
                             "stages")
    drawn = loop.directory / SCENES / DATA
    asked = None if loop.recipe.scenes is None else asdict(loop.recipe.scenes)
    if drawn.is_file() and json.loads(drawn.read_text()) != asked:
        raise ValueError(f"{drawn.parent} holds other scenes than the recipe's: give the same, or choose "
                         "another --name")


def _carry_out(loop: Loop) -> Figures:
    _draw(loop)
    for stage in (PRETRAIN, CAPTIONER, FILTER):
        _train(loop, loop.stages[stage])
    for name in loop.capfilt:
        _clean(loop, name)
    _train(loop, loop.stages[ANEW])
    asked = {"test": loop.recipe.test, "split": loop.recipe.test_split,
             **{name: asdict(loop.stages[stage].evaluation) for name, stage in MODELS.items()}}
    return _cached(loop, "measure", loop.stages[ANEW].directory / MEASURED, asked, lambda: measure(loop))


def _cached(loop: Loop, stage: str, path: Path, asked: dict[str, Any], find: Callable[[], Any]) -> Any:
    """The result of `find`, which is JSON: from its file if it was found for the
    same `asked`, else found now."""
    if path.is_file() and (stored := json.loads(path.read_text()))["asked"] == asked:
        return stored["found"]
    _print_stage(loop, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = find()
    torch.cuda.empty_cache()  # for the processes of later stages
    replace_file(path, (json.dumps({"asked": asked, "found": found}, indent=2) + "\n").encode())
    return found


def _print_stage(loop: Loop, stage: str) -> None:
    print(f"blip-fast: seed {loop.seed}: {stage}", file=sys.stderr, flush=True)


def _draw(loop: Loop) -> None:
    """Draw and pack the scenes that do not exist yet."""
    scenes = loop.recipe.scenes
    if scenes is None:
        return
    root, seed = loop.directory / SCENES, 4 * loop.seed  # four sets per seed
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / DATA, json.dumps(asdict(scenes)).encode())
    sets = {"web": (scenes.web, "train", seed, scenes.noise, False),
            "human": (scenes.human, "train", seed + 1, 0.0, True),
            "calibration": (scenes.calibration, "train", seed + 2, 0.0, False),
            "test": (scenes.test, "test", seed + 3, 0.0, False)}
    for name, (count, split, own_seed, noise, twins) in sets.items():
        if not (root / name / INDEX).is_file():
            _print_stage(loop, f"draw {name}")
            drawn, packed = root / "drawn", root / name
            for unfinished in (drawn, packed):
                shutil.rmtree(unfinished, ignore_errors=True)
            write_scenes(drawn, count, split, own_seed, noise, scenes.image_size, ONE_OBJECT[split], twins)
            pack(drawn, drawn / ANNOTATIONS, packed)
            shutil.rmtree(drawn)


def _train(loop: Loop, stage: Recipe) -> None:
    """Run `blip-fast train` for a stage that is not finished. One that ended before its
    first checkpoint starts anew."""
    if (stage.directory / TRAINED).is_file():
        return
    resume = bool(whole(stage.directory / "checkpoints"))
    if not resume:
        shutil.rmtree(stage.directory, ignore_errors=True)
    stage.directory.mkdir(parents=True, exist_ok=True)
    saved = stage.directory / STAGE
    replace_file(saved, stage.to_yaml().encode())
    _print_stage(loop, stage.name)
    _command("train", "--config", str(saved), *(["--resume"] if resume else []))


def _clean(loop: Loop, name: str) -> None:
    """Run `blip-fast capfilt` for one source; it skips finished shards."""
    arguments = loop.capfilt[name]
    if (calibration := loop.recipe.calibration) is not None:
        arguments = [*arguments, f"--threshold={_threshold(loop, capfilt_options(arguments), calibration)}"]
    _print_stage(loop, f"capfilt {name}")
    _command("capfilt", *arguments)


def _command(*arguments: str) -> None:
    """Run a command in a process of its own, which frees all memory at its end, and exit with its status if
    it fails. Its output goes to stderr. SIGTERM is passed on to it; Ctrl-C reaches both processes."""
    with sigterm_interrupts(), subprocess.Popen([sys.executable, "-m", "blip_fast", *arguments],
                                                stdout=sys.stderr) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped):
                process.terminate()
            process.wait()
            sys.exit(exit_status(stop))
    if status:
        sys.exit(128 - status if status < 0 else status)  # a negative status is the signal that killed it


def _threshold(loop: Loop, options: Namespace, calibration: Calibration) -> float:
    """The calibrated threshold. It is stored, because a resumed CapFilt must get exactly the same one."""
    def find() -> float:
        matcher = Matcher.from_pretrained(options.filter, **model_options(options))
        images = annotated_images(loop.located(calibration.data), calibration.split)
        return calibrate(matcher, images, calibration.keep, options.first_token)

    return _cached(loop, "calibrate", loop.directory / CLEANED / THRESHOLD, asdict(calibration), find)


def measure(loop: Loop) -> Figures:
    """A finished loop's figures, with chance levels.

    Returns:
        With drawn scenes: `removal_precision` and `removal_recall` (`FilterQuality`), and `right_raw` and
        `right_cleaned`, the shares of right texts before and after. With a test set, for the model
        pre-trained on raw pairs (`raw_…`) and the one on cleaned pairs (`cleaned_…`): `i2t_r1`, `t2i_r1`,
        `caption_loss` (nats per token) and, if scenes are captioned, `slot_accuracy` and `exact_match`.
        `chance_…` of every figure that has one.
    """
    figures = _removal_figures(loop) if loop.recipe.scenes is not None else {}
    if loop.recipe.test is not None:
        for name, stage in MODELS.items():
            found = _model_figures(loop, loop.stages[stage])
            figures |= {key if key.startswith("chance_") else f"{name}_{key}": value
                        for key, value in found.items()}
    return figures


def _removal_figures(loop: Loop) -> Figures:
    kept, right, after = [], [], []
    for name in loop.recipe.web:
        folder = loop.directory / CLEANED / name
        for record in (sample.record for part in (folder, folder / DROPPED) for sample in iterate(part)):
            if "scene" not in record:
                continue
            scene = scene_from_slots(record["scene"])
            web = [text["kept"] for text in record["texts"] if text["origin"] == "web"]
            kept += web
            right += [record["caption_is_right"]] * len(web)
            after += [score_caption(caption, scene)[2] for caption in record["captions"]]
    if not right:
        return {}
    quality = filter_quality(kept, right)
    return {"removal_precision": quality.removal_precision, "removal_recall": quality.removal_recall,
            "chance_removal_precision": quality.chance_removal_precision,
            "chance_removal_recall": quality.chance_removal_recall,
            "right_raw": sum(right) / len(right), "right_cleaned": sum(after) / max(len(after), 1)}


def _model_figures(loop: Loop, stage: Recipe) -> Figures:
    """A pre-trained model's figures on the held-out images, in float32, with the stage's
    `evaluation.rerank` and `beams`."""
    assert loop.recipe.test is not None
    images = annotated_images(loop.located(loop.recipe.test), loop.recipe.test_split)
    captioner = Captioner.from_pretrained(stage.directory / EXPORT, dtype="float32")
    result, image_of_text = evaluate_retrieval(captioner.model, captioner.tokenizer, images,
                                               top_k=stage.evaluation.rerank)
    recalls, chances = result.recalls(image_of_text), result.chances(image_of_text)
    generation = GenerationConfig(beams=stage.evaluation.beams, max_length=MAX_LENGTH, min_length=MIN_LENGTH)
    captions = evaluate_captions(captioner, images, generation, prompt=stage.data.prompt.strip())
    figures = {f"{prefix}{name}": values[name] for prefix, values in (("", recalls), ("chance_", chances))
               for name in ("i2t_r1", "t2i_r1")} | {"caption_loss": captions.loss}
    if (slots := captions.slots) is not None:
        figures |= {"slot_accuracy": slots.slot_accuracy, "exact_match": slots.exact_match,
                    "chance_slot_accuracy": slots.chance_slot_accuracy,
                    "chance_exact_match": slots.chance_exact_match}
    return figures
