"""`blip-fast serve`: captions, scores, answers and search over HTTP, with a web page."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.caption_options import add_caption_options
from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import add_model_options, model_options
from blip_fast.serve.settings import LOOPBACK, Limits, Settings

MODELS = ("model", "matcher", "answerer")
KEY = "BLIP_FAST_API_KEY"
MOST_CAPTIONS = 5


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser, required=False, models=MODELS, several_devices=True)
    add = parser.add_argument
    add("--index", type=str | None, metavar="DIR",
        help="serve searches of this index (`blip-fast search index`); its model also scores, unless "
             "--matcher does")
    add("--explain", action="store_true", help="serve heat maps, by weights of their own: more memory")
    add("--workers", type=int | None, metavar="N",
        help="processes with a model, dealt out over the devices (default: one for each device)")
    add("--batch-size", type=int, default=16, help="pictures, or questions, that a worker works on together")
    add("--beams", type=int, default=3, help="1 is greedy; alternatives are as many at most")
    add_caption_options(parser)
    add("--strip-prompt", action="store_true", help="leave the prompt out of captions")
    add("--rerank", type=int, default=64, metavar="N",
        help="with --index: the matching head looks at so many hits")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=8000, help="0 is any that is free")
    add("--api-key", type=str | None, metavar="KEY",
        help=f"that clients must send; better in the environment, as {KEY}, where other users do not see it")
    add("--allow-anyone", action="store_true", help="listen at an address of the network without a key")
    add("--url-hosts", type=str | None, metavar="HOST,HOST",
        help="also take pictures by URL, from these hosts alone; never from addresses of private networks")
    _limit_arguments(parser)


def _limit_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-upload-mb", type=float, default=Limits.upload_bytes / 1e6, help="of a request's body")
    add("--max-pixels", type=int, default=Limits.pixels, help="of a picture")
    add("--max-images", type=int, default=Limits.images, help="of a request")
    add("--max-texts", type=int, default=Limits.texts, help="of a request")
    add("--max-characters", type=int, default=Limits.text_characters, help="of a text")
    add("--queue", type=int, default=Limits.queue,
        help="pictures and questions in the house; what comes beyond gets status 429")
    add("--seconds", type=float, default=Limits.seconds,
        help="that a request may take; a worker that says nothing for so long is replaced")
    add("--decoders", type=int, default=2, help="processes that open pictures")


def settings_from(arguments: Sequence[str]) -> Settings:
    """The settings of a `blip-fast serve` command line. Raises ValueError if the options do not fit."""
    parser = ArgumentParser(exit_on_error=False)
    _arguments(parser)
    return _settings(parser.parse_args(list(arguments)))


def _run(args: Namespace) -> None:
    settings = _settings(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("multipart", "python_multipart"):  # these loggers quote what was sent
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from blip_fast.serve.server import serve

    serve(settings, args.host, args.port)


def _settings(args: Namespace) -> Settings:
    from blip_fast.media.images import MAX_PIXELS

    if all(getattr(args, name) is None for name in (*MODELS, "index")):
        raise ValueError("nothing to serve: name a --model, a --matcher, an --answerer or an --index")
    if args.explain and args.model is None and args.matcher is None and args.index is None:
        raise ValueError("--explain needs a model that matches texts: name a --matcher, a --model "
                         "or an --index")
    if args.batch_size < 1 or args.decoders < 1 or (args.workers is not None and args.workers < 1):
        raise ValueError("--batch-size, --workers and --decoders must be at least 1")
    if args.queue < args.max_images:
        raise ValueError(f"--queue {args.queue} has no room for a request of --max-images "
                         f"{args.max_images}: raise the one, or lower the other")
    key = args.api_key if args.api_key is not None else os.environ.get(KEY) or None
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable()):
        raise ValueError("an API key needs 8 characters or more, of ASCII alone")
    if args.host not in LOOPBACK and key is None and not args.allow_anyone:
        raise ValueError(f"--host {args.host} lets the network in: set an API key (--api-key or "
                         f"{KEY}), or say --allow-anyone")
    if args.max_pixels > MAX_PIXELS:
        raise ValueError(f"--max-pixels {args.max_pixels} is more than images are read with: "
                         f"{MAX_PIXELS} at most")
    worker = _worker(args)
    limits = Limits(upload_bytes=int(args.max_upload_mb * 1e6), pixels=args.max_pixels,
                    images=args.max_images, texts=args.max_texts, text_characters=args.max_characters,
                    queue=args.queue, seconds=args.seconds, captions=min(MOST_CAPTIONS, args.beams))
    guarded = key is not None or args.allow_anyone
    return Settings(worker, _devices(args), limits, key, () if guarded else LOOPBACK,
                    tuple(host.strip() for host in (args.url_hosts or "").split(",") if host.strip()),
                    args.decoders)


def _worker(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of every worker's `WorkerOptions`. Raises ValueError as `GenerationConfig` does."""
    from blip_fast.generate import GenerationConfig

    caption = {"beams": args.beams, "max_length": args.max_length, "min_length": args.min_length,
               "beam_rule": args.beam_rule}
    GenerationConfig(**caption)
    return {"loading": model_options(args), "caption": caption, "batch_size": args.batch_size,
            "prompt": args.prompt, "strip_prompt": args.strip_prompt, "index": args.index,
            "captions": min(MOST_CAPTIONS, args.beams), "rerank": args.rerank, "explain": args.explain,
            **{name: getattr(args, name) for name in MODELS}}


def _devices(args: Namespace) -> tuple[str | None, ...]:
    """The device of each worker: workers are dealt over the devices in turn."""
    names = [name.strip() for name in args.devices.split(",")] if args.devices else [None]
    return tuple(names[number % len(names)] for number in range(args.workers or len(names)))


COMMAND = Command(
    help="serve captions, scores, answers and search over HTTP, with a page at /",
    example="blip-fast serve --model Salesforce/blip-image-captioning-base --matcher "
            "Salesforce/blip-itm-base-coco",
    arguments=_arguments,
    run=_run,
)
