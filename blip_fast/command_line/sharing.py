"""Options of commands whose work several machines can share, with files that may be under URLs."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_sharing_options(parser: ArgumentParser, dealt: str, positionals: str) -> None:
    """Add `--shard`, `--ray`, `--cache` and `--cache-gb`. `dealt` describes how shares are made;
    `positionals` are the arguments after which `--ray` should be written."""
    add = parser.add_argument
    add("--shard", default="0/1", metavar="I/N", help=f"do the I-th of N parts, {dealt}")
    add("--ray", nargs="?", const="", default=None, metavar="ADDRESS",
        help="spread the work over a Ray cluster (default: that of RAY_ADDRESS or of this machine); "
             f"write it after the {positionals}, or as --ray=ADDRESS")
    add("--cache", default="~/.cache/blip_fast/shards", metavar="DIR", help="where tars under URLs are kept")
    add("--cache-gb", type=float, default=100.0, help="its limit")
