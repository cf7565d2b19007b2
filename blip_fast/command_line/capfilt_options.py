"""The options of `blip-fast capfilt`, which `blip-fast bootstrap` uses too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.model_options import add_model_options
from blip_fast.command_line.sharing import add_sharing_options

if TYPE_CHECKING:
    from blip_fast.capfilt.clean import CapFiltConfig


def add_capfilt_options(parser: ArgumentParser) -> None:
    add_model_options(parser, models=("captioner", "filter"))
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS",
        help="webdataset shards (.tar), folders or quoted patterns of them, or URLs of shards that "
             "`blip-fast data pack` wrote; captions are KEY.json's `captions` or `caption`, or KEY.txt")
    add("--output", required=True, metavar="DIR",
        help="folder for the new shards, their index of texts, quarantine.jsonl and report.html; with "
             "--ray one that all machines of the cluster see")
    add("--resume", action="store_true", help="go on with the folder, leave out shards that are finished")
    add("--captions", type=int, default=1, metavar="N", help="synthetic captions per image")
    add("--prompt", default="a picture of", help='what captions begin with; "" for nothing')
    add("--top-p", type=float, default=0.9,
        help="nucleus sampling: draw from tokens that hold this probability")
    add("--top-k", type=int, default=50, help="and from so many tokens at most")
    add("--temperature", type=float, default=1.0, help="above 1 is more varied")
    add("--beams", type=int | None, help="beam search instead of sampling")
    add("--max-length", type=int, default=20, help="tokens at most, the first one and the prompt counted")
    add("--min-length", type=int, default=5,
        help="a caption cannot end before it has so many tokens, counted alike")
    add("--seed", type=int, default=0, help="with the image's pixels it decides what is drawn")
    add("--threshold", type=float, default=0.5, help="ITM's probability from which on a text is kept")
    add("--keep", default="matched",
        help="matched: all texts that reach the threshold; best: of them each image's best alone")
    add("--first-token", default="[ENC]",
        help="what texts start with before the matching head: [ENC] as in training, or [CLS]")
    add("--batch-size", type=int, default=16, help="images at a time")
    add("--json", action="store_true", help="print what was written as one JSON object")
    add_sharing_options(parser, "for N machines with the same arguments; tars are dealt whole. Who ends last "
                                "writes shards.json and the report", "shards")


def filter_config(args: Namespace) -> CapFiltConfig:
    """The CapFiltConfig of the parsed options. Raises ValueError for values out of range."""
    from blip_fast.capfilt.clean import CapFiltConfig
    from blip_fast.generate import GenerationConfig

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    sampling = {"top_p": args.top_p, "top_k": args.top_k, "temperature": args.temperature, "seed": args.seed}
    generation = GenerationConfig(max_length=args.max_length, min_length=args.min_length,
                                  n_best=args.captions,
                                  **(sampling if args.beams is None else {"beams": args.beams}))
    return CapFiltConfig(args.prompt, generation, args.threshold, args.first_token, args.keep)
