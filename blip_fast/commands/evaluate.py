"""`blip-fast evaluate`: what a model is worth on annotated images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command
from blip_fast.commands.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.data.annotated import AnnotatedImage


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("task", choices=("retrieval", "caption"), help="what to evaluate")
    add_model_options(parser)
    add("--data", required=True, metavar="DIR", help="folder with annotations.jsonl and images, or packed shards")
    add("--split", type=str | None, default="test", help="rows to take; null takes all")
    add("--top-k", type=int, default=256, help="retrieval: candidates that the matching head re-ranks, of each image "
                                               "and of each text; 0 for cosines alone")
    add("--first-token", default="[ENC]", help="retrieval: what the matching head's texts start with, [ENC] or [CLS]")
    add("--prompt", default="a picture of", help='caption: what captions begin with; "" for nothing')
    add("--beams", type=int, default=3, help="caption: 1 is greedy")
    add("--max-length", type=int, default=20, help="caption: tokens at most, the prompt counted")
    add("--min-length", type=int, default=5, help="caption: tokens before the end may come")
    add("--output", type=str | None, metavar="FILE.jsonl", help="caption: write image, caption, references here")
    add("--json", action="store_true", help="print the figures as one JSON object")


def _run(args: Namespace) -> None:
    from blip_fast.data.annotated import annotated_images

    if args.output is not None and args.task != "caption":
        raise ValueError("--output is for captions: `evaluate retrieval` has figures only")
    images = annotated_images(args.data, args.split)
    figures = (_retrieval if args.task == "retrieval" else _caption)(args, images)
    if args.json:
        print(json.dumps({"task": args.task, "images": len(images), **figures}))
    else:
        _print_table(args.task, len(images), figures)


def _retrieval(args: Namespace, images: list[AnnotatedImage]) -> dict[str, Any]:
    from blip_fast.evaluation import evaluate_retrieval
    from blip_fast.tasks.loading import load_for_task

    model, tokenizer = load_for_task(args.model, **model_options(args))
    with _progress(len(images)) as (track, pairs_done):
        result, image_of_text = evaluate_retrieval(model, tokenizer, images, top_k=args.top_k,
                                                   first_token=args.first_token, track=track, progress=pairs_done)
    return {"texts": len(image_of_text), "top_k": args.top_k, "pairs": result.pairs, **result.recalls(image_of_text),
            **result.median_ranks(image_of_text), "chance": result.chances(image_of_text)}


def _caption(args: Namespace, images: list[AnnotatedImage]) -> dict[str, Any]:
    from blip_fast.data.annotated import annotated_images
    from blip_fast.evaluation import evaluate_captions
    from blip_fast.generate import GenerationConfig
    from blip_fast.tasks.caption import Captioner

    generation = GenerationConfig(beams=args.beams, max_length=args.max_length, min_length=args.min_length)
    train = [] if args.split == "train" else [caption for image in annotated_images(args.data, None)
                                              if image.row.get("split") == "train" for caption in image.captions]
    captioner = Captioner.from_pretrained(args.model, **model_options(args))
    with _progress(len(images)) as (track, _):
        result = evaluate_captions(captioner, images, generation, prompt=args.prompt, train_captions=train, track=track)
    if args.output is not None:
        rows = ({"image": image.name, "caption": caption, "references": image.captions}
                for image, caption in zip(images, result.captions, strict=True))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    figures = {"lm_loss": result.loss, "unigram_entropy": result.unigram_entropy,
               "unigram_cross_entropy": result.unigram_cross_entropy}
    if result.slots is not None:
        scores = asdict(result.slots)
        chance = {name: scores.pop(f"chance_{name}") for name in ("slot_accuracy", "exact_match")}
        figures |= {**scores, "chance": chance}
    return figures


@contextmanager
def _progress(images: int) -> Iterator[tuple[Callable[[Iterable[Any]], Iterable[Any]], Callable[[int, int], None]]]:
    """Bars on the terminal's error stream: (wraps the images, is told of re-ranked pairs)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        pairs = progress.add_task("pairs", total=None, visible=False)
        yield (lambda items: progress.track(items, total=images, description="images"),
               lambda done, total: progress.update(pairs, completed=done, total=total, visible=True))


def _print_table(task: str, images: int, figures: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    chance = figures.pop("chance", {})
    table = Table(f"{task}, {images} images", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    if chance:
        table.add_column("chance", justify="right")
    for name, value in figures.items():
        shown = "–" if value is None else f"{100 * value:.1f} %" if name in chance else f"{value:.4g}"
        beside = [f"{100 * chance[name]:.1f} %" if name in chance else ""] if chance else []
        table.add_row(name, shown, *beside)
    Console().print(table)


COMMAND = Command(
    help="measure a model: retrieval recalls, or captions and their loss",
    example="blip-fast evaluate retrieval --model Salesforce/blip-itm-base-flickr --data flickr8k --top-k 128 --json",
    arguments=_arguments,
    run=_run,
)
