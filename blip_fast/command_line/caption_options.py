"""The options for generating captions that several commands share."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_caption_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", default="a picture of", help='what captions begin with; "" for nothing')
    add("--max-length", type=int, default=20, help="tokens at most, the first one and the prompt counted")
    add("--min-length", type=int, default=5,
        help="the caption cannot end before it has so many tokens, counted alike")
    add("--beam-rule", default="transformers5",
        help="transformers5 or authors: how beams are scored, when they stop")
