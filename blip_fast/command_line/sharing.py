"""Options of commands whose work several machines share, over files that may lie under URLs."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_sharing_options(parser: ArgumentParser, dealt: str, behind: str) -> None:
    """`--shard`, `--ray`, `--cache` and `--cache-gb`; `dealt` says how a share is cut, `behind` what stands before
    `--ray`."""
    add = parser.add_argument
    add("--shard", default="0/1", metavar="I/N", help=f"do the I-th of N parts, {dealt}")
    add("--ray", nargs="?", const="", default=None, metavar="ADDRESS",
        help="spread the work over a Ray cluster (default: that of RAY_ADDRESS or of this machine); write it behind "
             f"the {behind}, or as --ray=ADDRESS")
    add("--cache", default="~/.cache/blip_fast/shards", metavar="DIR", help="where tars under URLs are kept")
    add("--cache-gb", type=float, default=100.0, help="its limit")
