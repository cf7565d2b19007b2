"""The images named on a command line, one after another: files, folders, patterns, webdataset shards, lists.

Only the names in the folder being listed are in memory (about 70 bytes each).
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
    """Part `index` of `count`, for several machines that get the same arguments and see the same files.

    Images on file systems are dealt out one by one. Tars under URLs are dealt out whole, so that no two
    machines fetch the same tar.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index}/{self.count} is none: "
                             "of n shares, name one from 0/n to (n − 1)/n")

    @classmethod
    def parse(cls, text: str) -> Share:
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"{text!r} is no share: write INDEX/COUNT, "
                             "for example 0/4 to 3/4 on four machines")
        return cls(int(index), int(count))

    def holds(self, number: int) -> bool:
        return number % self.count == self.index


@dataclass(frozen=True)
class Unreadable:
    """A placeholder for expected images that cannot be had. Reading it raises ImageError with the reason."""

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
        """The images of the share's tars. The next tar is fetched meanwhile; tars that are done are
        skipped."""
        tars = (tar for number, tar in enumerate(self.tars())
                if share.holds(number) and not is_done(tar.url, tar.shard))
        for tar, error in read_ahead(tars, fetched, threads=1, ahead=1):
            if error is None:
                yield from _images_or_error(tar.images(), tar.url)
            else:
                yield StoredImage(tar.url, Unreadable(str(error)))


ImageLister = RemoteTars | Callable[[], Iterator[StoredImage]]  # lists the images of one argument


def expand(arguments: Sequence[str], cache: ShardCache, share: Share = Share(),
           is_done: Callable[[str, Shard], bool] = lambda url, shard: False) -> Iterator[StoredImage]:
    """The images that arguments name.

    An argument is an image file; a folder, for the image files and tars below it (sorted, folder by folder);
    a quoted pattern (`photos/**/*.jpg`), for the image files and tars that match; or a tar, for the images in
    it.

    Tars under URLs need the `shards.json` that `blip-fast data pack` writes; a URL names its directory or one
    of its tars. A folder that cannot be listed, or a tar that is broken after its start, becomes one image
    that cannot be read.

    Args:
        cache: for tars under URLs.
        share: the part of the images that is wanted.
        is_done: whether a tar under a URL can be skipped.

    Raises:
        FileNotFoundError: a path or URL does not exist. This and the other errors are raised at once.
        ValueError: a folder, pattern or tar has no images.
        OSError: a URL cannot be read.
    """
    listers = [_lister(argument, cache) for argument in arguments]
    return _images(listers, share, is_done)


def _images(
    listers: Sequence[ImageLister], share: Share, is_done: Callable[[str, Shard], bool]
) -> Iterator[StoredImage]:
    number = 0
    for lister in listers:
        if isinstance(lister, RemoteTars):
            yield from lister.images(share, is_done)
            continue
        for image in lister():
            if share.holds(number):
                yield image
            number += 1


def listed(lines: Iterable[str], share: Share = Share()) -> Iterator[tuple[StoredImage, str | None]]:
    """The images named by a list, each with the prompt that follows it after a tab, if any. Blank lines are
    left out."""
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
    """The tars that arguments name: tar files; folders, by their `shards.json` or else the tars below them
    (sorted); quoted patterns, by the tars that match; URLs as in `expand`.

    Raises what `expand` raises, and ValueError if a folder's `shards.json` does not fit its tars.
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
        found = [Path(name) for name in sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
                 if name.endswith(TAR)]
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


def _lister(argument: str, cache: ShardCache) -> ImageLister:
    if _is_remote(argument):
        return _remote(argument, cache)
    path = Path(local_path(argument))
    if path.is_dir():
        return _nonempty(lambda: _walk(path), argument)
    if path.suffix.lower() == TAR and path.is_file():
        next(LocalTar(path).images(), None)  # raises ValueError if it is no tar
        return _nonempty(lambda: _file_or_tar(str(path)), argument)
    if path.exists():
        return lambda: iter([_file(argument)])
    if glob.has_magic(argument):
        return _nonempty(lambda: _matches(argument), argument)
    raise FileNotFoundError(f"{argument}: no such image, folder or shard")


def _nonempty(
    lister: Callable[[], Iterator[StoredImage]], argument: str
) -> Callable[[], Iterator[StoredImage]]:
    """The lister itself. Raises ValueError if it lists no image."""
    if next(lister(), None) is None:
        raise ValueError(f"{argument} holds no images ({', '.join(sorted(SUFFIXES))})")
    return lister


def _walk(folder: Path) -> Iterator[StoredImage]:
    """The images of image files and tars below a folder, sorted. Links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                     for entry in entries
                     if _is_wanted(entry.name) or entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        yield StoredImage(str(folder), Unreadable(f"{folder}: cannot be listed: {error.strerror}"))
        return
    for name in sorted(names, key=lambda name: name.rstrip("/")):
        yield from _walk(folder / name) if name.endswith("/") else _file_or_tar(str(folder / name))


def _matches(pattern: str) -> Iterator[StoredImage]:
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
    for name in sorted(name for name in names if _is_wanted(name)):
        yield from _file_or_tar(name)


def _file_or_tar(name: str) -> Iterator[StoredImage]:
    if Path(name).suffix.lower() == TAR:
        yield from _images_or_error(LocalTar(Path(name)).images(), name)
    else:
        yield _file(name)


def _images_or_error(images: Iterator[StoredImage], tar: str) -> Iterator[StoredImage]:
    """A tar's images; if the tar is broken, then the tar itself as an image that cannot be read."""
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
    """Fetch a tar. Returns the error if that failed for good."""
    try:
        tar.fetch()
    except OSError as error:
        return error
