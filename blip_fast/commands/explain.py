"""`blip-fast explain`: draw heat maps of where in an image the words of a text are seen."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import add_model_options, model_options, settle_precision

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="image file")
    add("text", metavar="TEXT", help="what it shows")
    add("--word", action="append", default=[], metavar="WORDS",
        help="a word of the text, or several that follow each other; may be repeated (default: each word)")
    add("--output", required=True, metavar="PICTURE.png",
        help="where the picture goes; the suffix says its format")
    add("--layer", type=int | None,
        help="whose cross-attention, from 0 (default: the eighth of twelve, or that share of fewer)")
    add("--first-token", default="[CLS]",
        help="what the text starts with: [CLS] as in transformers, [ENC] as in training")
    add("--json", action="store_true",
        help="print JSON: image, text, itm, map (of the whole text) and words (word, map); maps are "
             "rows of patches")


def _run(args: Namespace) -> None:
    from blip_fast.media.images import load_image

    if Path(args.output).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output {args.output} must end with one of {', '.join(SUFFIXES)}")
    picture = load_image(args.image)
    from blip_fast.inference.precision import say
    from blip_fast.report.heat import panel_size, word_sheet
    from blip_fast.tasks.explainer import Explainer

    line = settle_precision(args, differentiable=True)
    explainer = Explainer.from_pretrained(args.model, **model_options(args))
    explanation = explainer(picture, args.text, args.word, layer=args.layer, first_token=args.first_token)
    say(line)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    word_sheet(panel_size(picture), [explanation.text, *explanation.words]).save(args.output)
    if args.json:
        words = [{"word": word.word, "map": word.map.tolist()} for word in explanation.words]
        print(json.dumps({"image": args.image, "text": args.text, "itm": explanation.itm,
                          "map": explanation.text.map.tolist(), "words": words}, ensure_ascii=False))
    else:
        print(f"itm {explanation.itm:.4f}  {args.output}")


COMMAND = Command(
    help="draw where in an image the words of a text are seen (Grad-CAM of cross-attention)",
    example='blip-fast explain --model Salesforce/blip-itm-base-coco photo.jpg "a dog on grass" '
            '--output seen.png',
    arguments=_arguments,
    run=_run,
)
