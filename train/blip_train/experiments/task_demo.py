"""VQA, NLVR2, VisDial and video end to end in minutes, on drawn scenes: one pre-trained model,
fine-tuned on questions, on pairs with statements and on dialogues, and measured on scenes with
combinations never seen in training.

As in the paper (section 5.6), nothing is trained on clips: the pre-trained model retrieves them by their
captions, and the model fine-tuned on questions about pictures answers questions about clips.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from blip_fast.data.shards.annotated import ANNOTATIONS, AnnotatedImage, annotated_images, read_annotations
from blip_fast.data.shards.videos import as_videos
from blip_fast.evaluation import evaluate_answers, evaluate_dialogues, evaluate_pairs, evaluate_retrieval
from blip_fast.media.video import require_av
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.scenes.clips import QUESTIONS, write_clips
from blip_fast.scenes.scene_tasks import LONGEST, SPLITS, WORDS, blind_answers, chance, write_scene_task
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.dialog_ranking import DialogRanker
from blip_fast.tasks.model_loading import load_for_task
from blip_fast.tasks.reasoner import Reasoner
from blip_train.launch import carry_out
from blip_train.prepare import EXPORT
from blip_train.recipe import Recipe, load_recipe

PRETRAINING, CLIPS = "pretrain", "clips"
FILES = ("metrics.json", "report.html")
RECIPES = {"questions": "scenes_vqa.yaml", "pairs": "scenes_nlvr2.yaml", "dialogues": "scenes_visdial.yaml"}
# Numbers of pictures to train and to test on.
PICTURES = {"questions": (6000, 400), "pairs": (24000, 400), "dialogues": (6000, 150), CLIPS: (0, 200)}
# Prefixes of the tasks' figures.
PREFIXES = {"questions": "", "pairs": "nlvr2_", "dialogues": "visdial_", CLIPS: "video_"}
SEED = 3  # of the tasks' pictures; pre-training's have their recipe's
# Frames per clip, and candidates that ITM re-ranks: as in `blip-fast evaluate`.
RETRIEVAL_FRAMES, ANSWERING_FRAMES, RERANKED = 8, 16, 64


@dataclass(frozen=True)
class TaskDemoResult:
    """The measurements. By task: the recipe (none for clips), the test rows, the figures that `blip-fast
    evaluate` prints, the chance levels without seeing anything (`scene_tasks.chance`), and the answers to
    questions, also about clips. By stage: `seconds`."""

    recipes: dict[str, Recipe]
    test: dict[str, list[AnnotatedImage]]
    figures: dict[str, dict[str, Any]]
    chances: dict[str, dict[str, float]]
    answers: dict[str, list[str]]
    seconds: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of `metrics.json`, with chance levels if there are any."""
        found = {f"{PREFIXES[task]}{name}": value for task, figures in self.figures.items()
                 for name, value in figures.items()}
        chances = {f"chance_{PREFIXES[task]}{name}": value for task, levels in self.chances.items()
                   for name, value in levels.items()}
        return found | {"seconds": round(sum(self.seconds.values()), 1)} | chances


def task_demo(directory: Path, model: Path | None = None, pictures: Mapping[str, tuple[int, int]] = PICTURES,
              options: Sequence[str] = ()) -> TaskDemoResult:
    """Pre-train, fine-tune on each task and measure it, all in `directory` (replacing an earlier call's
    files), and write its `metrics.json`.

    Args:
        model: a model pre-trained on scenes, to use instead of pre-training with `scenes.yaml`. An earlier
            pre-training in `directory` is then kept.
        pictures: how many to train and to test on, by task; for pairs, how many pairs.
        options: options of `blip-fast train` for all recipes (`["--runtime.ranks=1"]`).

    Raises:
        ValueError: PyAV is not installed; the directory holds something else; the model's
            vocabulary lacks the tasks' words, or the model has too few positions. Raised before
            anything is removed or trained.
    """
    require_av()
    if model is not None:
        _check(model)
    _clear(directory, {"data", *RECIPES} if model is not None else {"data", *RECIPES, PRETRAINING, "words"})
    result = TaskDemoResult({}, {}, {}, {}, {}, {})
    if model is None:
        started = time.perf_counter()
        model = carry_out(_pretraining(directory, options))
        result.seconds[PRETRAINING] = time.perf_counter() - started
    size = load_for_task(model, dtype="float32")[0].config.vision.image_size
    for task, name in RECIPES.items():
        started = time.perf_counter()
        train, held_out = (directory / "data" / task / split for split in SPLITS)
        for folder, split, count in zip((train, held_out), SPLITS, pictures[task], strict=True):
            write_scene_task(task, folder, count, split, SEED, size)
        result.recipes[task] = _recipe(name, f"--name={task}", f"--runs={directory}", f"--init={model}",
                                       f"--model.vision.image_size={size}", f"--data.root={train}", *options)
        carry_out(result.recipes[task])
        result.test[task] = annotated_images(held_out, None)
        _measure(task, result)
        result.chances[task] = chance(*(read_annotations(folder / ANNOTATIONS)
                                        for folder in (train, held_out)))
        result.seconds[task] = time.perf_counter() - started
    started = time.perf_counter()
    _measure_clips(model, directory / "data", pictures[CLIPS][1], size, result)
    result.seconds[CLIPS] = time.perf_counter() - started
    (directory / "metrics.json").write_text(json.dumps(result.metrics, indent=2) + "\n")
    return result


def _check(model: Path) -> None:
    """Raise ValueError if a model cannot read the tasks' texts."""
    loaded, tokenizer = load_for_task(model, dtype="float32")
    pieces = {word: tokenizer.encode(word)[1:-1] for word in WORDS}
    if lacking := [word for word, ids in pieces.items() if len(ids) > 1 or tokenizer.unk_id in ids]:
        raise ValueError(f"{model} lacks the words {', '.join(lacking)}: leave --model out, and one that has "
                         "them is pre-trained")
    if loaded.config.text.max_positions < LONGEST:
        raise ValueError(f"{model} has {loaded.config.text.max_positions} text positions, dialogues need "
                         f"{LONGEST}: leave --model out, and one that has them is pre-trained")


def _clear(directory: Path, folders: Set[str]) -> None:
    """Remove the folders and files that an earlier call wrote and nothing else."""
    own = {PRETRAINING, "words", "data", *RECIPES, *FILES}
    if directory.exists() and (others := sorted(path.name for path in directory.iterdir()
                                                if path.name not in own)):
        raise ValueError(f"{directory} holds {others[0]}, which is not of these tasks: name another "
                         "directory with --output")
    for name in folders:
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


def _pretraining(directory: Path, options: Sequence[str]) -> Recipe:
    """`scenes.yaml` without wrong captions, with the tasks' words in its vocabulary and
    enough positions for dialogues."""
    Tokenizer([*BERT_TOKENS, *WORDS]).save(directory / "words")
    return _recipe("scenes.yaml", f"--name={PRETRAINING}", f"--runs={directory}",
                   f"--tokenizer.source={directory / 'words'}", f"--model.text.max_positions={LONGEST}",
                   "--data.scenes.noise=0.0", "--evaluation.images=0", *options)


def _recipe(name: str, *options: str) -> Recipe:
    return load_recipe(Path(str(files("blip_train") / "recipes" / name)), list(options))


def _measure(task: str, result: TaskDemoResult) -> None:
    """Store the figures that `blip-fast evaluate --dtype float32` prints, and the answers to questions."""
    model, images = result.recipes[task].directory / EXPORT, result.test[task]
    if task == "questions":
        found = evaluate_answers(Answerer.from_pretrained(model, dtype="float32"), images)
        assert found.vqa_accuracy is not None  # ten people answered each question
        by_type = {f"vqa_accuracy_{kind}": value for kind, value in sorted(found.by_type.items())}
        result.figures[task], result.answers[task] = {"vqa_accuracy": found.vqa_accuracy, **by_type}, found.answers
    elif task == "pairs":
        judged = evaluate_pairs(Reasoner.from_pretrained(model, dtype="float32"), images)
        result.figures[task] = {"accuracy": judged.accuracy, "consistency": judged.consistency}
    else:
        figures = evaluate_dialogues(DialogRanker.from_pretrained(model, dtype="float32"), images)
        result.figures[task] = {name: figures[name] for name in ("mrr", "r1", "r5", "r10", "mean_rank")}


def _measure_clips(model: Path, data: Path, count: int, size: int, result: TaskDemoResult) -> None:
    """Draw clips, retrieve them with the pre-trained model, and answer questions
    about them with the VQA model."""
    folder = data / CLIPS / "test"
    write_clips(folder, count, "test", SEED, size)
    videos = as_videos(annotated_images(folder, None), RETRIEVAL_FRAMES)
    found, video_of_text = evaluate_retrieval(*load_for_task(model, dtype="float32"), videos, top_k=RERANKED)
    result.test[CLIPS] = as_videos(annotated_images(folder / QUESTIONS, None), ANSWERING_FRAMES)
    answerer = Answerer.from_pretrained(result.recipes["questions"].directory / EXPORT, dtype="float32")
    answered = evaluate_answers(answerer, result.test[CLIPS])
    asked = [image.row for image in result.test[CLIPS]]
    blind = blind_answers(read_annotations(data / "questions" / "train" / ANNOTATIONS), asked)
    result.answers[CLIPS] = answered.answers
    result.figures[CLIPS] = {**found.recalls(video_of_text), "qa_accuracy": answered.commonest}
    result.chances[CLIPS] = {**found.chances(video_of_text), "qa_accuracy": sum(
        row["answers"] == [answer] for row, answer in zip(asked, blind, strict=True)) / len(asked)}
