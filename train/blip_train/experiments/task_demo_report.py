"""The tasks' page: figures with targets and chance levels, pictures and clips with
questions and answers, losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.media.images import ImageSource, load_image
from blip_fast.media.video import read_frames
from blip_fast.metrics.vqa import commonest_answer
from blip_fast.report.page import Card, Line, Metric, Report
from blip_fast.scenes.scene_tasks import QUESTIONS_EACH, VALUES
from blip_fast.tasks.dialog_ranking import DialogRanker, Dialogue
from blip_fast.tasks.reasoner import Reasoner
from blip_train.experiments.task_demo import CLIPS, TaskDemoResult
from blip_train.prepare import EXPORT
from blip_train.run_report import loss_plots, named_metrics

SHOWN = 12  # pictures per section
GAP = 4  # pixels between pictures side by side
NAMES = {
    "vqa_accuracy": ("VQA accuracy, answers written", 0.80),
    "nlvr2_accuracy": ("NLVR2 accuracy", 0.80),
    "nlvr2_consistency": ("NLVR2 consistency", 0.60),
    "visdial_r1": ("VisDial R@1", 0.75),
    "visdial_r5": ("VisDial R@5", 0.95),
    "visdial_mrr": ("VisDial MRR", 0.85),
    "video_i2t_r1": ("Video retrieval R@1, video → text", 0.80),
    "video_t2i_r1": ("Video retrieval R@1, text → video", 0.80),
    "video_qa_accuracy": ("Video QA accuracy", 0.60),
}


def task_figures(result: TaskDemoResult) -> list[Metric]:
    """The figures with their targets and chance levels."""
    return named_metrics(result.metrics, NAMES)


def write_task_report(result: TaskDemoResult, path: Path) -> Path:
    """Write the page. Returns its path."""
    counts = {task: f"{len(images):,}" for task, images in result.test.items()}
    report = Report("Questions, pairs, dialogues and clips about drawn scenes",
                    "One pre-trained model, fine-tuned on each task but clips, measured on combinations of "
                    "things that were never in training. Chance is what somebody reaches who has read all of "
                    "training but sees no picture.",
                    facts={"held-out questions": counts["questions"], "held-out pairs": counts["pairs"],
                           "held-out dialogues": counts["dialogues"], "questions about clips": counts[CLIPS],
                           "minutes": f"{sum(result.seconds.values()) / 60:.1f}"})
    report.section("What was reached").metrics(task_figures(result))
    _questions(report, result)
    _pairs(report, result)
    _dialogues(report, result)
    _clips(report, result)
    for task, title in (("questions", "VQA"), ("pairs", "NLVR2"), ("dialogues", "VisDial")):
        report.section(f"Loss of {title}").plots(loss_plots(result.recipes[task].directory / "log.jsonl"))
    report.section("Where the time went").table(["Stage", "Seconds"],
                                               [[stage, round(value, 1)]
                                                for stage, value in result.seconds.items()])
    return report.write(path)


def _questions(report: Report, result: TaskDemoResult) -> None:
    report.section("Questions",
                   "The official accuracy over ten votes, by what the answer is. A cross is followed by the "
                   "right answer.")
    kinds = [f"vqa_accuracy_{kind}" for kind in VALUES]
    figures, chances = result.figures["questions"], result.chances["questions"]
    report.metrics([Metric(name.removeprefix("vqa_accuracy_"), figures[name], chance=chances[name])
                    for name in kinds if name in figures])
    images = result.test["questions"]
    report.cards(_question_cards(images, result.answers["questions"],
                                 [image.load() for image in _row_per_picture(images)]))


def _row_per_picture(images: Sequence[AnnotatedImage]) -> Sequence[AnnotatedImage]:
    """One row per picture, for the first pictures; `QUESTIONS_EACH` rows in a row
    ask about the same picture."""
    return images[: SHOWN * QUESTIONS_EACH : QUESTIONS_EACH]


def _question_cards(asked: Sequence[AnnotatedImage], answers: Sequence[str],
                    shown: Sequence[ImageSource]) -> list[Card]:
    """One card per picture, with all questions about it."""
    lines = [_line(image.row["question"], answer, commonest_answer(image.row["answers"]))
             for image, answer in zip(asked, answers, strict=True)]
    return [Card(picture, lines[i * QUESTIONS_EACH : (i + 1) * QUESTIONS_EACH])
            for i, picture in enumerate(shown)]


def _pairs(report: Report, result: TaskDemoResult) -> None:
    images = result.test["pairs"][:SHOWN]
    reasoner = Reasoner.from_pretrained(result.recipes["pairs"].directory / EXPORT, dtype="float32")
    pairs = [(image.load(), image.second.load()) for image in images if image.second is not None]
    judged = reasoner(pairs, [image.captions[0] for image in images]).tolist()
    report.section("Pairs", "Each statement is true of one pair and false of one that differs from it in one "
                            "slot.")
    report.cards([Card(_side_by_side(*pair), [_line(image.captions[0], *(
        "true" if true else "false" for true in (probability > 0.5, image.row["label"])))])
        for pair, image, probability in zip(pairs, images, judged, strict=True)])


def _dialogues(report: Report, result: TaskDemoResult) -> None:
    ranker = DialogRanker.from_pretrained(result.recipes["dialogues"].directory / EXPORT, dtype="float32")
    report.section("Dialogues",
                   "The best of the candidate answers of every round, which is read together with the "
                   "caption and the rounds before.")
    report.cards([_dialogue_card(ranker, image) for image in result.test["dialogues"][:SHOWN]])


def _dialogue_card(ranker: DialogRanker, image: AnnotatedImage) -> Card:
    dialogue = Dialogue.from_rows(image.captions[0], image.row["dialog"])
    scores = ranker(image.load(), dialogue)
    answers = [one.candidates[int(values.argmax())]
               for one, values in zip(dialogue.rounds, scores, strict=True)]
    lines = [_line(one.question, best, one.answer)
             for one, best in zip(dialogue.rounds, answers, strict=True)]
    return Card(image.load(), [Line(dialogue.caption, "caption"), *lines])


def _clips(report: Report, result: TaskDemoResult) -> None:
    report.section("Clips",
                   "Questions about videos in which one thing moves, answered by the model that learnt them "
                   "from pictures; it sees the tokens of all frames as those of one picture. Three frames "
                   "are shown.")
    clips = result.test[CLIPS]
    shown = [_side_by_side(*read_frames(clip.where, 3)) for clip in _row_per_picture(clips)
             if isinstance(clip.where, Path)]
    report.cards(_question_cards(clips, result.answers[CLIPS], shown))


def _line(question: str, answer: str, truth: str) -> Line:
    return Line(answer if answer == truth else f"{answer} ({truth})", question, right=answer == truth)


def _side_by_side(*pictures: ImageSource) -> Image.Image:
    images = [load_image(picture) for picture in pictures]
    together = Image.new("RGB", (sum(image.width + GAP for image in images) - GAP,
                                 max(image.height for image in images)), "white")
    left = 0
    for image in images:
        together.paste(image, (left, 0))
        left += image.width + GAP
    return together
