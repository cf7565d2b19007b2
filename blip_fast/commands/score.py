"""`blip-fast score`: how well texts describe an image."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command
from blip_fast.commands.model_options import add_model_options, model_options


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="image file")
    add("texts", nargs="+", metavar="TEXT", help="texts to hold against the image")
    add("--first-token", default="[CLS]",
        help="what texts start with before the matching head: [CLS] as in transformers, [ENC] as in training and in "
             "the published retrieval evaluation")
    add("--json", action="store_true", help="print JSON: image, text, itm, itc")


def _run(args: Namespace) -> None:
    from blip_fast.images import load_image

    image = load_image(args.image)
    from blip_fast.tasks.match import Matcher

    matcher = Matcher.from_pretrained(args.model, **model_options(args))
    scores = matcher.score(image, args.texts, first_token=args.first_token)
    for text, itm, itc in zip(args.texts, scores.itm[0].tolist(), scores.itc[0].tolist(), strict=True):
        if args.json:
            print(json.dumps({"image": args.image, "text": text, "itm": itm, "itc": itc}, ensure_ascii=False))
        else:
            print(f"itm {itm:.4f}  itc {itc:+.4f}  {text}")


COMMAND = Command(
    help="score texts against an image: matching probability (ITM) and cosine (ITC)",
    example='blip-fast score --model Salesforce/blip-itm-base-coco --json photo.jpg "a dog" "two people"',
    arguments=_arguments,
    run=_run,
)
