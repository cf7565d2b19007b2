"""The images that a command line names, one after another: files, folders, patterns, webdataset shards, lists.

Nothing is held but the names in the folder that is just being listed (about 70 bytes each).
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip_fast.data.shards.shard_cache import ShardCache
from blip_fast.data.shards.shards import INDEX, Shard, is_url, read_index
from blip_fast.data.shards.tars import LocalTar, RemoteTar
from blip_fast.media.images import SUFFIXES, ImageError, StoredImage, local_path
from blip_fast.parallel.read_ahead import read_ahead

TAR = ".tar"
WANTED = SUFFIXES | {TAR}


@dataclass(frozen=True)
class Share:
    """Part `index` of `count`, for several machines that are given the same arguments and see the same files.

    Images on file systems are dealt one by one, tars under URLs whole, so that no two machines fetch the same one.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index}/{self.count} is none: of n shares, name one from 0/n to (n − 1)/n")

    @classmethod
    def parse(cls, text: str) -> Share:
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"{text!r} is no share: write INDEX/COUNT, for example 0/4 to 3/4 on four machines")
        return cls(int(index), int(count))

    def holds(self, number: int) -> bool:
        return number % self.count == self.index


@dataclass(frozen=True)
class Unreadable:
    """Stands where images were expected and cannot be had; reading it raises the reason."""

    reason: str

    def read(self, start: int, size: int) -> bytes:
        raise ImageError(self.reason)


@dataclass(frozen=True)
class RemoteTars:
    """Tars under a URL that has an index."""

    root: str
    shards: tuple[Shard, ...]
    cache: ShardCache

    def tars(self) -> list[RemoteTar]:
        return [RemoteTar(f"{self.root}/{shard.file}", shard, self.cache) for shard in self.shards]

    def images(self, share: Share, is_done: Callable[[str, Shard], bool]) -> Iterator[StoredImage]:
        """Those of the share's tars; the next tar is fetched meanwhile, one that is done is not."""
        tars = (tar for number, tar in enumerate(self.tars())
                if share.holds(number) and not is_done(tar.url, tar.shard))
        for tar, error in read_ahead(tars, fetched, threads=1, ahead=1):
            if error is None:
                yield from _whole(tar.images(), tar.url)
            else:
                yield StoredImage(tar.url, Unreadable(str(error)))


Source = RemoteTars | Callable[[], Iterator[StoredImage]]


def expand(arguments: Sequence[str], cache: ShardCache, share: Share = Share(),
           is_done: Callable[[str, Shard], bool] = lambda url, shard: False) -> Iterator[StoredImage]:
    """Files as they are, folders by the image files and tars below them (sorted, folder by folder), quoted patterns
    (`photos/**/*.jpg`) by the image files and tars that match, tars by the image members in them.

    Tars under URLs need the `shards.json` that `blip-fast data pack` writes; a URL names its directory or one of its
    tars. A folder that cannot be listed, or a tar that is broken further on, is one image that cannot be read.

    Args:
        cache: for tars under URLs.
        share: the part of the images that is wanted.
        is_done: whether a tar under a URL need not be looked at.

    Raises:
        FileNotFoundError: for a path or URL that is not there; at once, as the other errors.
        ValueError: for a folder, pattern or tar without images.
        OSError: for a URL that cannot be read.
    """
    sources = [_source(argument, cache) for argument in arguments]
    return _images(sources, share, is_done)


def _images(sources: Sequence[Source], share: Share, is_done: Callable[[str, Shard], bool]) -> Iterator[StoredImage]:
    number = 0
    for source in sources:
        if isinstance(source, RemoteTars):
            yield from source.images(share, is_done)
            continue
        for image in source():
            if share.holds(number):
                yield image
            number += 1


def listed(lines: Iterable[str], share: Share = Share()) -> Iterator[tuple[StoredImage, str | None]]:
    """Images that a list names, each with the prompt that follows it behind a tab, if any; blank lines are left out."""
    entries = (line.rstrip("\r\n").partition("\t") for line in lines if line.strip())
    for number, (name, tab, prompt) in enumerate(entries):
        if share.holds(number):
            yield _file(name), prompt if tab else None


def open_list(name: str) -> Iterable[str]:
    """The lines of a file, or of standard input ("-"). Raises FileNotFoundError."""
    if name == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]
        return sys.stdin
    return Path(name).open(encoding="utf-8", errors="surrogateescape")


def tars(arguments: Sequence[str], cache: ShardCache) -> list[LocalTar | RemoteTar]:
    """Tar files as they are, folders by their `shards.json` or else the tars below them (sorted), quoted patterns by
    the tars that match, URLs as for `expand`.

    Raises what `expand` raises; and ValueError where a folder's `shards.json` does not fit its tars.
    """
    return [tar for argument in arguments for tar in _tars(argument, cache)]


def _tars(argument: str, cache: ShardCache) -> Sequence[LocalTar | RemoteTar]:
    if _is_remote(argument):
        return _remote(argument, cache).tars()
    path = Path(local_path(argument))
    if (path / INDEX).is_file():
        found = [path / shard.file for shard in read_index(path).shards]
    elif path.is_dir():
        found = sorted(path.rglob(f"*{TAR}"))
    elif path.is_file():
        found = [path]
    elif glob.has_magic(argument):
        found = [Path(name) for name in sorted(glob.glob(argument, recursive=True)) if name.endswith(TAR)]  # noqa: PTH207
    else:
        raise FileNotFoundError(f"{argument}: no such shard, folder of shards or pattern")
    if not found or (path.is_file() and path.suffix.lower() != TAR):
        raise ValueError(f"{argument} holds no shards ({TAR})")
    return [LocalTar(tar) for tar in found]


def _is_remote(argument: str) -> bool:
    return is_url(argument) and not argument.startswith("file:")


def _remote(argument: str, cache: ShardCache) -> RemoteTars:
    root, _, file = argument.rpartition("/") if argument.endswith(TAR) else (argument.rstrip("/"), "", "")
    shards = tuple(shard for shard in read_index(root).shards if file in ("", shard.file))
    if not shards:
        raise FileNotFoundError(f"{argument} is not in its directory's shards.json")
    return RemoteTars(root, shards, cache)


def _source(argument: str, cache: ShardCache) -> Source:
    if _is_remote(argument):
        return _remote(argument, cache)
    path = Path(local_path(argument))
    if path.is_dir():
        return _with_images(lambda: _walk(path), argument)
    if path.suffix.lower() == TAR and path.is_file():
        next(LocalTar(path).images(), None)  # raises where it is no tar
        return _with_images(lambda: _file_or_tar(str(path)), argument)
    if path.exists():
        return lambda: iter([_file(argument)])
    if glob.has_magic(argument):
        return _with_images(lambda: _matching(argument), argument)
    raise FileNotFoundError(f"{argument}: no such image, folder or shard")


def _with_images(source: Callable[[], Iterator[StoredImage]], argument: str) -> Callable[[], Iterator[StoredImage]]:
    if next(source(), None) is None:
        raise ValueError(f"{argument} holds no images ({', '.join(sorted(SUFFIXES))})")
    return source


def _walk(folder: Path) -> Iterator[StoredImage]:
    """Image files and tars below it, sorted. Links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries
                     if _is_wanted(entry.name) or entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        yield StoredImage(str(folder), Unreadable(f"{folder}: cannot be listed: {error.strerror}"))
        return
    for name in sorted(names, key=lambda name: name.rstrip("/")):
        yield from _walk(folder / name) if name.endswith("/") else _file_or_tar(str(folder / name))


def _matching(pattern: str) -> Iterator[StoredImage]:
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
    for name in sorted(name for name in names if _is_wanted(name)):
        yield from _file_or_tar(name)


def _file_or_tar(name: str) -> Iterator[StoredImage]:
    if Path(name).suffix.lower() == TAR:
        yield from _whole(LocalTar(Path(name)).images(), name)
    else:
        yield _file(name)


def _whole(images: Iterator[StoredImage], tar: str) -> Iterator[StoredImage]:
    """A tar's images and, where it is broken, the tar as one that cannot be read."""
    try:
        yield from images
    except (ValueError, OSError) as error:
        yield StoredImage(tar, Unreadable(str(error)))


def _file(name: str) -> StoredImage:
    try:
        return StoredImage(name, Path(local_path(name)))
    except ImageError as error:
        return StoredImage(name, Unreadable(str(error)))


def _is_wanted(name: str) -> bool:
    return Path(name).suffix.lower() in WANTED


def fetched(tar: RemoteTar) -> OSError | None:
    """Fetch a tar; the error where that failed for good."""
    try:
        tar.fetch()
    except OSError as error:
        return error
