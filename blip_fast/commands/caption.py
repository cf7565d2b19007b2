"""`blip-fast caption`: captions for any number of images, on the terminal or into a JSON Lines file."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command
from blip_fast.commands.image_rows import Row, Work, Worker, add_image_options, named, run_images
from blip_fast.commands.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.tasks.caption import Captioned, Captioner


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add_image_options(parser, "one a line, perhaps a tab and its own prompt behind")
    add = parser.add_argument
    add("--prompt", default="a picture of", help='what captions begin with; "" for nothing')
    add("--strip-prompt", action="store_true", help="leave the prompt out of `caption`")
    add("--beams", type=int | None, help="1 is greedy (default: 3, or 1 with --top-p)")
    add("--max-length", type=int, default=20, help="tokens at most, the first one and the prompt counted")
    add("--min-length", type=int, default=5, help="the caption cannot end before it has so many tokens, counted alike")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat fewer words")
    add("--length-penalty", type=float, default=1.0, help="above 1: prefer long captions among beams")
    add("--beam-rule", default="transformers5", help="transformers5 or authors: how beams are scored, when they stop")
    add("--top-p", type=float | None, help="nucleus sampling: draw from tokens that hold this probability")
    add("--top-k", type=int, default=50, help="with --top-p: from so many tokens at most")
    add("--temperature", type=float, default=1.0, help="with --top-p: above 1 is more varied")
    add("--seed", type=int, default=0, help="with --top-p; with the image's pixels it decides what is drawn")
    add("--n-best", type=int, default=1, metavar="N", help="texts per image, at most as many as beams, or samples")
    add("--banned", action="append", default=[], metavar="WORDS", help="what no caption may contain; may be repeated")
    add("--json", action="store_true", help="print JSON: image, caption, token_ids, score; or image, error")


def _run(args: Namespace) -> int:
    return run_images(args, partial(_worker, args, _caption_options(args)), _lines)


def _caption_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `Captioner.stream`."""
    from blip_fast.generate import GenerationConfig

    beams = args.beams if args.beams is not None else 1 if args.top_p is not None else 3
    generation = GenerationConfig(
        beams=beams, max_length=args.max_length, min_length=args.min_length, beam_rule=args.beam_rule,
        repetition_penalty=args.repetition_penalty, length_penalty=args.length_penalty, n_best=args.n_best,
        top_p=args.top_p, top_k=args.top_k, temperature=args.temperature, seed=args.seed)
    return {"prompt": args.prompt, "generation": generation, "banned": args.banned, "strip_prompt": args.strip_prompt,
            "batch_size": args.batch_size}


def _worker(args: Namespace, options: dict[str, Any]) -> Worker:
    from blip_fast.tasks.caption import Captioner

    return partial(_rows, Captioner.from_pretrained(args.model, **model_options(args)), options)


def _rows(captioner: Captioner, options: dict[str, Any], work: Iterable[Work]) -> Generator[Row]:
    """What is written about each image: image, its own prompt, if any, and caption, token_ids, score, perhaps others;
    or error."""
    given = (image if prompt is None else (image, prompt) for image, prompt in work)
    for captioned in captioner.stream(given, **options):
        yield _row(captioned)


def _row(captioned: Captioned) -> Row:
    from blip_fast.images import ImageError

    begun = named(captioned.image, captioned.prompt)
    if isinstance(captioned.result, ImageError):
        return {**begun, "error": str(captioned.result)}
    row = {**begun, **asdict(captioned.result)}
    others = [{key: other[key] for key in ("caption", "token_ids", "score")} for other in row.pop("others")]
    return {**row, "others": others} if others else row


def _lines(row: Row) -> Iterable[str]:
    return (f"{row['image']}\t{text['caption']}" for text in (row, *row.get("others", ())))


COMMAND = Command(
    help="write captions for images",
    example="blip-fast caption --model Salesforce/blip-image-captioning-base --json photos/",
    arguments=_arguments,
    run=_run,
)
