"""`blip-fast caption`: captions for any number of images, on the terminal or into a JSON Lines file."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command
from blip_fast.commands.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.commands.inputs import Share
    from blip_fast.commands.jsonl import DoneRows, JsonLines
    from blip_fast.data.shards import Shard
    from blip_fast.images import StoredImage
    from blip_fast.tasks.caption import Captioned, Captioner

    Work = tuple[StoredImage, str | None]  # an image and its own prompt

Row = dict[str, Any]
RAY_BATCHES = 8  # batches of images that a worker of a cluster is given together
MAX_REASONS = 20  # kinds of errors that are counted apart


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE",
        help="image files, folders, quoted patterns ('photos/**/*.jpg'), webdataset shards (.tar), or URLs of shards "
             "that `blip-fast data pack` wrote (s3://bucket/shards)")
    add("--list", type=str | None, metavar="FILE",
        help="also the images named in FILE (- is standard input), one a line, perhaps a tab and its own prompt behind")
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
    add("--batch-size", type=int, default=16, help="images at a time")
    add("--json", action="store_true", help="print JSON: image, caption, token_ids, score; or image, error")
    add("--output", type=str | None, metavar="FILE.jsonl", help="write JSON lines here instead of printing")
    add("--resume", action="store_true", help="with --output: go on with the file, leave out images that it holds")
    add("--shard", default="0/1", metavar="I/N",
        help="do the I-th of N parts, for N machines that see the same files: images are dealt one by one, tars under "
             "URLs whole")
    add("--ray", nargs="?", const="", default=None, metavar="ADDRESS",
        help="spread the work over a Ray cluster (default: that of RAY_ADDRESS or of this machine); write it behind "
             "the images, or as --ray=ADDRESS")
    add("--cache", default="~/.cache/blip_fast/shards", metavar="DIR", help="where tars under URLs are kept")
    add("--cache-gb", type=float, default=100.0, help="its limit")


def _run(args: Namespace) -> int:
    from blip_fast.commands.inputs import Share
    from blip_fast.commands.jsonl import JsonLines
    from blip_fast.commands.progress import sigterm_interrupts

    options, share = _caption_options(args), Share.parse(args.shard)
    if not args.images and args.list is None:
        raise ValueError("no image is named: name files, folders or shards, or a list of them (--list FILE)")
    if args.resume and args.output is None:
        raise ValueError("--resume needs --output FILE.jsonl, the file to go on with")
    with (sigterm_interrupts(), nullcontext() if args.output is None else
          closing(JsonLines(args.output, args.resume)) as output):
        return _caption_all(args, options, share, output)


def _caption_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `Captioner.stream`."""
    from blip_fast.generate import GenerationConfig

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    beams = args.beams if args.beams is not None else 1 if args.top_p is not None else 3
    generation = GenerationConfig(
        beams=beams, max_length=args.max_length, min_length=args.min_length, beam_rule=args.beam_rule,
        repetition_penalty=args.repetition_penalty, length_penalty=args.length_penalty, n_best=args.n_best,
        top_p=args.top_p, top_k=args.top_k, temperature=args.temperature, seed=args.seed)
    return {"prompt": args.prompt, "generation": generation, "banned": args.banned, "strip_prompt": args.strip_prompt,
            "batch_size": args.batch_size}


def _caption_all(args: Namespace, options: dict[str, Any], share: Share, output: JsonLines | None) -> int:
    """Caption and report. An image that cannot be read does not end the run, unless it is the only one."""
    from blip_fast.commands.progress import Stopped, progress_bar

    work = _left(args, share, output)
    first = list(islice(work, 2))
    if not first:
        print("blip-fast: nothing left to caption", file=sys.stderr)
        return 0
    if len(first) == 1 and output is None:
        first[0][0].load()
    report, hidden = _Report(args.json, output), output is None and sys.stdout.isatty()
    make_rows = _on_ray if args.ray is not None else _here
    try:
        with progress_bar("captions", "img", partial(_count, args, share, output), hidden) as advance, \
                closing(make_rows(args, options, chain(first, work))) as rows:
            for row in rows:
                report.add(row)
                advance()
    except KeyboardInterrupt as stop:
        where = "" if output is None else f"; {output.path} is whole: the same command with --resume goes on with it"
        print(f"blip-fast: interrupted after {report.rows:,} images{where}", file=sys.stderr)
        return 143 if isinstance(stop, Stopped) else 130
    finally:
        report.print_errors()
    return 1 if report.reasons else 0


def _work(args: Namespace, share: Share, is_done: Callable[[str, Shard], bool]) -> Iterator[Work]:
    """All that the arguments name, in their order."""
    from blip_fast.commands.inputs import expand, listed, open_list
    from blip_fast.data.cache import shard_cache

    images = expand(args.images, shard_cache(args.cache, args.cache_gb), share, is_done)
    return chain(((image, None) for image in images), listed(open_list(args.list), share) if args.list else ())


def _left(args: Namespace, share: Share, output: JsonLines | None) -> Iterator[Work]:
    """What has no row yet."""
    if output is None:
        return _work(args, share, lambda url, shard: False)
    done: DoneRows = output.done
    work = _work(args, share, lambda url, shard: done.in_tars[url] >= shard.samples)
    return ((image, prompt) for image, prompt in work if not done.take(image.name, prompt))


def _count(args: Namespace, share: Share, output: JsonLines | None) -> int | None:
    """How many images are to be captioned; None where that cannot be known before."""
    if args.list == "-":
        return None
    in_tars = 0

    def count_and_skip(url: str, shard: Shard) -> bool:
        nonlocal in_tars
        in_tars += shard.samples
        return True

    files = sum(1 for _ in _work(args, share, count_and_skip))
    return files + in_tars - (0 if output is None else output.done.count)


def _here(args: Namespace, options: dict[str, Any], work: Iterable[Work]) -> Generator[Row]:
    return _rows(_captioner(args), options, work)


def _on_ray(args: Namespace, options: dict[str, Any], work: Iterable[Work]) -> Generator[Row]:
    from blip_fast.cluster import on_ray

    work = iter(work)
    batches = iter(lambda: list(islice(work, RAY_BATCHES * args.batch_size)), [])
    return on_ray(args.ray or None, batches, partial(_worker, args, options), gpus=args.device != "cpu")


def _worker(args: Namespace, options: dict[str, Any]) -> Callable[[Sequence[Work]], Iterator[Row]]:
    return partial(_rows, _captioner(args), options)


def _captioner(args: Namespace) -> Captioner:
    from blip_fast.tasks.caption import Captioner

    return Captioner.from_pretrained(args.model, **model_options(args))


def _rows(captioner: Captioner, options: dict[str, Any], work: Iterable[Work]) -> Generator[Row]:
    """What is written about each image: image, its own prompt, if any, and caption, token_ids, score, perhaps others;
    or error."""
    given = (image if prompt is None else (image, prompt) for image, prompt in work)
    for captioned in captioner.stream(given, **options):
        yield _row(captioned)


def _row(captioned: Captioned) -> Row:
    from blip_fast.images import ImageError

    named = {"image": captioned.image} | ({} if captioned.prompt is None else {"prompt": captioned.prompt})
    if isinstance(captioned.result, ImageError):
        return {**named, "error": str(captioned.result)}
    row = {**named, **asdict(captioned.result)}
    others = [{key: other[key] for key in ("caption", "token_ids", "score")} for other in row.pop("others")]
    return {**row, "others": others} if others else row


class _Report:
    """Writes or prints rows as they come, and counts those of images that could not be captioned, by reason."""

    def __init__(self, as_json: bool, output: JsonLines | None) -> None:
        self.rows, self.reasons = 0, Counter[str]()
        self._as_json, self._output = as_json, output

    def add(self, row: Row) -> None:
        if self._output is not None:
            self._output.write(row)
        elif self._as_json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif "error" not in row:
            for text in (row, *row.get("others", ())):
                print(f"{row['image']}\t{text['caption']}", flush=True)
        self.rows += 1
        if "error" in row:
            if self._output is None:
                print(f"blip-fast: {row['error']}", file=sys.stderr)
            reason = re.sub(r"\d[\d,.]*", "N", row["error"].removeprefix(f"{row['image']}: "))
            self.reasons[reason if len(self.reasons) < MAX_REASONS or reason in self.reasons else "other reasons"] += 1

    def print_errors(self) -> None:
        if self.reasons:
            print(f"blip-fast: {self.reasons.total():,} of {self.rows:,} images could not be captioned:",
                  file=sys.stderr)
        for reason, times in self.reasons.most_common():
            print(f"blip-fast: {times:,} × {reason}", file=sys.stderr)


COMMAND = Command(
    help="write captions for images",
    example="blip-fast caption --model Salesforce/blip-image-captioning-base --json photos/",
    arguments=_arguments,
    run=_run,
)
