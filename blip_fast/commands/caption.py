"""`blip-fast caption`: captions for files, folders and shards, on the terminal or into a JSON Lines file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command
from blip_fast.commands.jsonl import JsonLines
from blip_fast.commands.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.commands.inputs import ImageInput
    from blip_fast.generate import GenerationConfig
    from blip_fast.tasks.caption import Captioner


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders of images, webdataset shards (.tar)")
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
    add("--seed", type=int, default=0, help="with --top-p")
    add("--batch-size", type=int, default=16, help="images at a time")
    add("--json", action="store_true", help="print JSON: image, caption, token_ids, score; or image, error")
    add("--output", type=str | None, metavar="FILE.jsonl", help="write JSON lines here instead of printing")
    add("--resume", action="store_true", help="with --output: go on with the file, leave out images that it holds")


def _run(args: Namespace) -> int:
    from blip_fast.commands.inputs import expand

    generation = _generation(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.resume and args.output is None:
        raise ValueError("--resume needs --output FILE.jsonl, the file to go on with")
    images = expand(args.images)
    if args.output is None:
        return _caption_all(args, images, generation, None)
    with closing(JsonLines(args.output, args.resume)) as output:
        written = {row.get("image") for row in output.rows}
        return _caption_all(args, [image for image in images if image.name not in written], generation, output)


def _generation(args: Namespace) -> GenerationConfig:
    from blip_fast.generate import GenerationConfig

    beams = args.beams if args.beams is not None else 1 if args.top_p is not None else 3
    return GenerationConfig(
        beams=beams, max_length=args.max_length, min_length=args.min_length, beam_rule=args.beam_rule,
        repetition_penalty=args.repetition_penalty, length_penalty=args.length_penalty,
        top_p=args.top_p, top_k=args.top_k, temperature=args.temperature, seed=args.seed)


def _caption_all(args: Namespace, images: list[ImageInput], generation: GenerationConfig,
                 output: JsonLines | None) -> int:
    """Caption and report. An image that cannot be read does not end the run, unless it is the only one."""
    if not images:
        print("blip-fast: nothing left to caption", file=sys.stderr)
        return 0
    if len(images) == 1 and output is None:
        images[0].load()
    from blip_fast.tasks.caption import Captioner

    captioner = Captioner.from_pretrained(args.model, **model_options(args))
    failed = 0
    with _progress(len(images), hidden=output is None and sys.stdout.isatty()) as advance:
        for row in _rows(captioner, images, args, generation):
            if "error" in row:
                failed += 1
                print(f"blip-fast: {row['error']}", file=sys.stderr)
            _report(row, args.json, output)
            advance()
    if failed:
        print(f"blip-fast: {failed} of {len(images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _rows(captioner: Captioner, images: list[ImageInput], args: Namespace,
          generation: GenerationConfig) -> Iterator[dict[str, Any]]:
    """What is written about each image, in order: image, caption, token_ids, score; or image, error."""
    import torch

    from blip_fast.images import ImageError
    from blip_fast.tasks.loading import read_pixels

    pixels = read_pixels((image.load for image in images), captioner.model.config.vision.image_size)
    stream = zip(images, pixels, strict=True)
    while batch := list(islice(stream, args.batch_size)):
        readable = [read for _, read in batch if not isinstance(read, ImageError)]
        captions = iter(captioner.caption_pixels(torch.stack(readable), args.prompt, generation,
                                                 strip_prompt=args.strip_prompt) if readable else ())
        for image, read in batch:
            result = {"error": str(read)} if isinstance(read, ImageError) else asdict(next(captions))
            yield {"image": image.name, **result}


def _report(row: dict[str, Any], as_json: bool, output: JsonLines | None) -> None:
    if output is not None:
        output.write(row)
    elif as_json:
        print(json.dumps(row, ensure_ascii=False), flush=True)
    elif "error" not in row:
        print(f"{row['image']}\t{row['caption']}", flush=True)


@contextmanager
def _progress(images: int, hidden: bool) -> Iterator[Callable[[], None]]:
    """A bar on the terminal's error stream, for more than a few images; yields what moves it on by one."""
    if hidden or images < 10 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("captions", total=images)
        yield lambda: progress.advance(task)


COMMAND = Command(
    help="write captions for images",
    example="blip-fast caption --model Salesforce/blip-image-captioning-base --json photos/",
    arguments=_arguments,
    run=_run,
)
