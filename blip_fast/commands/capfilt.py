"""`blip-fast capfilt`: caption shards of web images, filter all texts, and write shards to train on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from blip_fast.command_line.capfilt_options import add_capfilt_options, filter_config
from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import model_options, settle_precision

if TYPE_CHECKING:
    from blip_fast.capfilt.clean import CapFiltConfig
    from blip_fast.capfilt.folder import CleanFolder
    from blip_fast.data.shards.named_images import Share
    from blip_fast.data.shards.tars import LocalTar, RemoteTar

    Tar = LocalTar | RemoteTar
    Work = tuple[int, Tar]  # a tar's number, and the tar
    Outcome = tuple[int, str | None]  # a tar's number, and why it could not be fetched (None: it was)


def _run(args: Namespace) -> int:
    from filelock import FileLock, Timeout

    from blip_fast.capfilt.folder import CleanFolder
    from blip_fast.data.shards.named_images import Share, tars
    from blip_fast.data.shards.shard_cache import shard_cache
    from blip_fast.inference.precision import say
    from blip_fast.parallel.signals import sigterm_interrupts

    config, share = filter_config(args), Share.parse(args.shard)
    folder = CleanFolder(Path(args.output).absolute())
    line = settle_precision(args, folder.precision)
    every = tars(args.shards, shard_cache(args.cache, args.cache_gb))
    names = ("captioner", "filter", "dtype", "image_size", "heads", "tokenizer")
    options = {**asdict(config), **{name: getattr(args, name) for name in names},
               "shards": [tar.name for tar in every]}
    folder.begin(options)
    say(line)
    lock = FileLock(folder.directory / f"part-{share.index}-of-{share.count}.lock", timeout=0)
    try:
        with sigterm_interrupts(), lock:
            return _clean(args, config, folder, every, share)
    except Timeout:
        raise ValueError(f"{args.output} is being written by another process: wait until that has "
                         "ended") from None


def _clean(args: Namespace, config: CapFiltConfig, folder: CleanFolder, every: Sequence[Tar],
           share: Share) -> int:
    """Clean the remaining shards of the share. If these are the last ones, complete the run."""
    from blip_fast.command_line.progress import progress_bar
    from blip_fast.parallel.signals import exit_status

    mine = [(number, tar) for number, tar in enumerate(every) if share.holds(number)]
    left = [(number, tar) for number, tar in mine if not folder.is_done(number)]
    if len(left) < len(mine) and not args.resume:
        raise FileExistsError(f"{args.output} holds finished shards: go on with them (--resume) or name "
                              "another folder")
    failed, done = [], 0
    clean = _on_ray if args.ray is not None else _here
    try:
        with progress_bar("shards", "shards", lambda: len(left)) as advance, \
                closing(clean(args, config, folder, left)) as outcomes:
            for number, error in outcomes:
                if error is not None:
                    print(f"blip-fast: {error}", file=sys.stderr)
                    failed.append(number)
                elif not folder.is_done(number):
                    raise ValueError(f"shard {number} was cleaned, but not into {args.output}: name a "
                                     "folder that all machines of the cluster see")
                done += 1
                advance()
    except KeyboardInterrupt as stop:
        print(f"blip-fast: interrupted after {done} shards; the same command with --resume goes on",
              file=sys.stderr)
        return exit_status(stop)
    _end(args, folder, len(every))
    return 1 if failed else 0


def _end(args: Namespace, folder: CleanFolder, count: int) -> None:
    """If all shards are done, write the indexes and the report. Print a summary."""
    from blip_fast.capfilt.capfilt_report import share_cut, write_report
    from blip_fast.data.shards.pack import QUARANTINE

    there = sum(folder.is_done(number) for number in range(count))
    if there < count:
        print(f"blip-fast: {there} of {count} shards are done; whoever does the last one (--resume) "
              "writes the index and the report", file=sys.stderr)
        return
    counts, page = write_report(folder, folder.finish(count))
    if args.json:
        print(json.dumps({**counts, "directory": args.output, "report": str(page)}))
        return
    print(f"{args.output}: {counts['images']:,} images, {counts['images_kept']:,} of them with a text "
          f"to train on; {counts['web_kept']:,} of {counts['web']:,} web texts and "
          f"{counts['synthetic_kept']:,} of {counts['synthetic']:,} synthetic ones are kept; "
          f"{counts['synthetic_cut']:,} synthetic ones ({share_cut(counts):.1%}) were cut off at "
          f"{args.max_length} tokens (--max-length)")
    if counts["refused"]:
        print(f"{args.output}/{QUARANTINE}: {counts['refused']:,} images left out, and why")
    print(f"look at {page}")


def _here(args: Namespace, config: CapFiltConfig, folder: CleanFolder,
          work: Sequence[Work]) -> Generator[Outcome]:
    if work:
        yield from _worker(args, config, folder)(work)


def _on_ray(args: Namespace, config: CapFiltConfig, folder: CleanFolder,
            work: Sequence[Work]) -> Generator[Outcome]:
    from blip_fast.parallel.ray_cluster import on_ray

    if work:
        yield from on_ray(args.ray or None, ([one] for one in work), partial(_worker, args, config, folder),
                          gpus=args.device != "cpu")


def _worker(args: Namespace, config: CapFiltConfig,
            folder: CleanFolder) -> Callable[[Sequence[Work]], Iterator[Outcome]]:
    """Load the models, and return the function that cleans shards with them."""
    from blip_fast.capfilt.clean import check_models
    from blip_fast.capfilt.shard import clean_shard
    from blip_fast.parallel.read_ahead import read_ahead
    from blip_fast.search.embedding import fingerprint
    from blip_fast.tasks.captioner import Captioner
    from blip_fast.tasks.matcher import Matcher

    options: dict[str, Any] = model_options(args)
    matcher = Matcher.from_pretrained(args.filter, **options)
    captioner = (Captioner(matcher.model, matcher.tokenizer) if args.captioner == args.filter
                 else Captioner.from_pretrained(args.captioner, **options))
    check_models(captioner, matcher, config)
    folder.check_weights([fingerprint(task.model) for task in (captioner, matcher)])

    def clean(work: Sequence[Work]) -> Iterator[Outcome]:
        for (number, tar), error in read_ahead(work, _fetch_error, threads=1, ahead=1):
            if error is None:
                clean_shard(tar, number, folder, captioner, matcher, config, args.batch_size)
            yield number, error

    return clean


def _fetch_error(work: Work) -> str | None:
    """Fetch a tar if it is under a URL. Returns the error if that fails."""
    from blip_fast.data.shards.named_images import fetched
    from blip_fast.data.shards.tars import RemoteTar

    error = fetched(work[1]) if isinstance(work[1], RemoteTar) else None
    return None if error is None else str(error)


COMMAND = Command(
    help="clean shards of web images: write captions, filter all texts (CapFilt)",
    example="blip-fast capfilt shards/ --captioner models/captioner --filter models/filter --output cleaned/",
    arguments=add_capfilt_options,
    run=_run,
)
