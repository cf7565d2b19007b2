"""The demo's page: figures with targets and chance levels, captions before and after,
what CapFilt removed, losses."""

from __future__ import annotations

from pathlib import Path

from blip_fast.capfilt.clean import CapFiltRow
from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.report.page import Card, Line, Metric, Report
from blip_fast.scenes.scenes import scene_from_slots, score_caption
from blip_train.experiments.demo import STAGES, DemoResult
from blip_train.run_report import loss_plots, named_metrics, retrieval_metrics

SHOWN = 12  # pictures per section
NAMES = {
    "retrieval_i2t_r1": ("retrieval R@1, image → text", 0.60),
    "retrieval_t2i_r1": ("retrieval R@1, text → image", 0.60),
    "caption_slot_accuracy": ("caption slots right", 0.85),
    "caption_exact_match": ("whole captions right", 0.40),
    "caption_same_in_bfloat16": ("captions the same in bfloat16", 0.95),
    "capfilt_precision": ("CapFilt precision (removed texts that were wrong)", 0.85),
    "capfilt_recall": ("CapFilt recall (wrong texts that were removed)", 0.85),
}


def figures(result: DemoResult) -> list[Metric]:
    """The demo's figures with their targets, and chance levels if there are any."""
    return named_metrics(result.metrics, NAMES)


def write_demo_report(result: DemoResult, path: Path) -> Path:
    """Write the page. Returns its path."""
    scenes = result.recipes["pretrain"].data.scenes
    assert scenes is not None
    report = Report("BLIP on drawn scenes",
                    "Pre-trained on noisy pairs, cleaned by its own captioner and filter, measured on scenes "
                    "with combinations that were never in training.",
                    facts={"training scenes": f"{scenes.count:,}", "wrong captions": f"{scenes.noise:.0%}",
                           "held-out scenes": str(len(result.test)),
                           "seed": str(result.recipes["pretrain"].seed),
                           "minutes": f"{sum(result.seconds.values()) / 60:.1f}"})
    report.section("What was reached").metrics(figures(result))
    _captions(report, result)
    _retrieval(report, result)
    _capfilt(report, result)
    titles = ("Losses of pre-training", "Losses of the captioner", "Losses of the filter")
    for stage, title in zip(STAGES, titles, strict=True):
        report.section(title).plots(loss_plots(result.recipes[stage].directory / "log.jsonl"))
    report.section("Where the time went").table(["Stage", "Seconds"],
                                               [[stage, round(value, 1)]
                                                for stage, value in result.seconds.items()])
    return report.write(path)


def _captions(report: Report, result: DemoResult) -> None:
    report.section("Captions of held-out scenes",
                   "Beam search with three beams: the pre-trained model, which learnt from noisy captions, "
                   "and the captioner fine-tuned on clean ones. The last line is the truth.")
    report.cards([Card(image.load(),
                       [_scene_line(before, "pre-trained", image), _scene_line(after, "captioner", image),
                                      Line(image.captions[0], "truth")])
                  for image, before, after in zip(result.test[:SHOWN], result.captions_before.captions,
                                                  result.captions.captions, strict=False)])


def _retrieval(report: Report, result: DemoResult) -> None:
    report.section("Retrieval among held-out scenes",
                   "ITC for all pairs, then ITM for the best of each direction.")
    report.metrics(retrieval_metrics(result.retrieval.recalls(result.image_of_text),
                                     result.retrieval.chances(result.image_of_text)))
    before, after = (r.recalls(result.image_of_text) for r in (result.retrieval_before, result.retrieval))
    rows = [[name, round(before[name], 3), round(after[name], 3)] for name in after]
    report.table(["", "pre-trained", "filter"], rows, "Before and after fine-tuning on clean pairs")


def _capfilt(report: Report, result: DemoResult) -> None:
    web, synthetic = result.cleaned.of_origin("web"), result.cleaned.of_origin("synthetic")
    removed = sum(not row.kept for row in web)
    kept_synthetic = sum(row.kept for row in synthetic)
    report.section("CapFilt",
                   f"Of {len(web):,} noisy captions the filter removed {removed:,}; of as many synthetic "
                   f"ones it kept {kept_synthetic:,}. A text passes at an ITM probability of "
                   f"{result.threshold:.2f} or more, the bar that 97 % of clean pairs clear. Removed texts "
                   "are struck through.")
    triples = list(zip(result.web, web, synthetic, strict=True))
    for kept in (False, True):
        chosen = [triple for triple in triples if triple[1].kept == kept][:SHOWN]
        report.cards([Card(image.load(), [_filter_line(row, image), _filter_line(made, image)])
                      for image, row, made in chosen])


def _filter_line(row: CapFiltRow, image: AnnotatedImage) -> Line:
    line = _scene_line(row.text, row.origin, image)
    return Line(line.text, line.label, f"ITM {row.itm:.2f}", line.right, struck=not row.kept)


def _scene_line(text: str, label: str, image: AnnotatedImage) -> Line:
    return Line(text, label, right=score_caption(text, scene_from_slots(image.row["scene"]))[2])
