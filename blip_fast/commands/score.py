"""`blip-fast score`: how well texts describe images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import add_model_options, model_options, settle_precision
from blip_fast.command_line.rows import Work, read_rows, run_rows

if TYPE_CHECKING:
    from torch import Tensor


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("image", nargs="?", type=str | None, metavar="IMAGE", help="image file")
    add("texts", nargs="*", metavar="TEXT", help="texts to hold against the image")
    add("--pairs", type=str | None, metavar="FILE",
        help='instead: a .jsonl file with "image" and "text" in every line (other keys are kept), or a '
             ".tsv file of both; prints JSON lines")
    add("--first-token", default="[CLS]",
        help="what texts start with before the matching head: [CLS] as in transformers, [ENC] as in "
             "training and in the published retrieval evaluation")
    add("--json", action="store_true", help="print JSON: image, text, itm, itc")
    add("--batch-size", type=int, default=16, help="with --pairs: images at a time")
    add("--output", type=str | None, metavar="FILE.jsonl",
        help="with --pairs: write here instead of printing")
    add("--resume", action="store_true",
        help="with --output: go on with the file, leave out the pairs that it holds")


def _run(args: Namespace) -> int:
    if (args.pairs is None) == (args.image is None):
        raise ValueError("name an image and its texts, or --pairs FILE")
    if args.pairs is not None:
        return run_rows(args, read_rows(args.pairs, "text"), "text", lambda: _work(args))
    if not args.texts:
        raise ValueError(f"no text to hold against {args.image}: name one at least")
    if args.output is not None or args.resume:
        raise ValueError("--output and --resume are for --pairs FILE")
    return _score_one(args)


def _score_one(args: Namespace) -> int:
    from blip_fast.media.images import load_image

    image = load_image(args.image)
    from blip_fast.inference.precision import say
    from blip_fast.tasks.matcher import Matcher

    line = settle_precision(args)
    matcher = Matcher.from_pretrained(args.model, **model_options(args))
    scores = matcher.score(image, args.texts, first_token=args.first_token)
    say(line)
    for text, itm, itc in zip(args.texts, scores.itm[0].tolist(), scores.itc[0].tolist(), strict=True):
        if args.json:
            print(json.dumps({"image": args.image, "text": text, "itm": itm, "itc": itc}, ensure_ascii=False))
        else:
            print(f"itm {itm:.4f}  itc {itc:+.4f}  {text}")
    return 0


def _work(args: Namespace) -> tuple[Work, int]:
    from blip_fast.tasks.matcher import Matcher, image_of_each

    matcher = Matcher.from_pretrained(args.model, **model_options(args))
    matcher.pack([], args.first_token)  # refuses an unknown first token before any work is done

    def score(pixels: Tensor, texts: list[list[str]]) -> Iterable[dict[str, Any]]:
        packed = matcher.pack([text for mine in texts for text in mine], args.first_token)
        scores = matcher.score_pairs(pixels, packed, image_of_each(texts))
        return ({"itm": itm, "itc": itc}
                for itm, itc in zip(scores.itm.tolist(), scores.itc.tolist(), strict=True))

    return score, matcher.model.config.vision.image_size


COMMAND = Command(
    help="score texts against images: matching probability (ITM) and cosine (ITC)",
    example='blip-fast score --model Salesforce/blip-itm-base-coco --json photo.jpg "a dog" "two people"',
    arguments=_arguments,
    run=_run,
)
