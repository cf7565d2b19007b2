"""`blip-fast classify`: zero-shot classification of any number of images with a list of labels."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.image_rows import Row, Work, Worker, add_image_options, run_images
from blip_fast.command_line.lists import read_list
from blip_fast.command_line.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.tasks.classifier import Classifier, Labels


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add_image_options(parser, "one a line; a tab and what follows it are left out")
    add = parser.add_argument
    add("--labels", required=True, metavar="FILE", help="a label a line, or a .json list")
    add("--template", action="append", default=[], metavar="TEXT",
        help='prompt about a label, with {} for it, instead of "a picture of a {}", "a photo of a {}" and '
             '"there is a {} in the picture"; may be repeated: features are averaged')
    add("--top-k", type=int, default=5, help="labels of each image, the likeliest first")
    add("--json", action="store_true",
        help="print JSON: image and labels (label, probability among all of the list, cosine itc); or "
             "image, error")


def _run(args: Namespace) -> int:
    if args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}")
    return run_images(args, partial(_worker, args, read_list(args.labels, "label")), _lines)


def _worker(args: Namespace, names: list[str]) -> Worker:
    from blip_fast.tasks.classifier import TEMPLATES, Classifier

    classifier = Classifier.from_pretrained(args.model, **model_options(args))
    return partial(_rows, classifier, classifier.labels(names, args.template or TEMPLATES), args)


def _rows(classifier: Classifier, labels: Labels, args: Namespace, work: Iterable[Work]) -> Generator[Row]:
    """A row for each image: image and labels, or image and error."""
    from blip_fast.media.images import ImageError

    images = (image for image, _ in work)
    for classified in classifier.stream(images, labels, top_k=args.top_k, batch_size=args.batch_size):
        if isinstance(classified.result, ImageError):
            yield {"image": classified.image, "error": str(classified.result)}
        else:
            yield {"image": classified.image, "labels": [asdict(label) for label in classified.result]}


def _lines(row: Row) -> Iterable[str]:
    return (f"{row['image']}\t{label['probability']:.4f}\t{label['label']}" for label in row["labels"])


COMMAND = Command(
    help="name what images show: the likeliest of a list of labels",
    example="blip-fast classify --model Salesforce/blip-itm-base-coco --labels labels.txt --top-k 3 photos/",
    arguments=_arguments,
    run=_run,
)
