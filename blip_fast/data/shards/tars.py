"""Images and samples in local or remote webdataset tar files: listed from the headers, read when they are
needed."""

from __future__ import annotations

import os
import tarfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from blip_fast.data.shards.shard_cache import ShardCache
from blip_fast.data.shards.shards import OpenShard, Shard
from blip_fast.media.images import SUFFIXES, Container, StoredImage


@dataclass(frozen=True)
class LocalTar:
    """A tar file on this machine's file system."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    def images(self) -> Iterator[StoredImage]:
        """Its images, named TAR/MEMBER. Raises what `images_in` raises."""
        with self.path.open("rb") as stream:
            yield from images_in(stream.fileno(), self.name, self)

    def samples(self) -> Iterator[StoredSample]:
        """Its samples, named TAR/KEY. Raises what `samples_in` raises."""
        with self.path.open("rb") as stream:
            yield from samples_in(stream.fileno(), self.name, self)


class RemoteTar:
    """A tar file under a URL. Each process that reads it first fetches it into its machine's cache."""

    def __init__(self, url: str, shard: Shard, cache: ShardCache) -> None:
        self.url, self.shard, self._cache = url, shard, cache
        self._open_shard: OpenShard | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.url

    def fetch(self) -> OpenShard:
        """Fetch and open the tar. It stays readable for the lifetime of this object, even if the cache
        removes the file. Raises what `ShardCache.open` raises."""
        with self._lock:
            if self._open_shard is None:
                self._open_shard = self._cache.open(self.url, self.shard)
                weakref.finalize(self, self._open_shard.close)
            return self._open_shard

    def read(self, start: int, size: int) -> bytes:
        return self.fetch().read_at(start, size)

    def images(self) -> Iterator[StoredImage]:
        """As `LocalTar.images`, named URL/MEMBER."""
        yield from images_in(self.fetch().fileno(), self.url, self)

    def samples(self) -> Iterator[StoredSample]:
        """As `LocalTar.samples`, named URL/KEY."""
        yield from samples_in(self.fetch().fileno(), self.url, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTar, (self.url, self.shard, self._cache)


@dataclass(frozen=True)
class StoredSample:
    """Consecutive members of a tar with the same key, not read yet. `name` is the sample's name in
    messages."""

    name: str
    key: str
    members: dict[str, StoredImage]  # by what follows the key: "jpg", "json", "second.jpg"


def images_in(descriptor: int, name: str, container: Container) -> Iterator[StoredImage]:
    """The image members of an open tar, read from its headers alone.

    Raises ValueError, after the last intact image, if it is no complete uncompressed tar file.
    """
    for member in _members(descriptor, name, container):
        if Path(member.name).suffix.lower() in SUFFIXES:
            yield member


def samples_in(descriptor: int, name: str, container: Container) -> Iterator[StoredSample]:
    """The samples of an open tar: members whose paths are the same up to the first dot of the file name.
    Raises what `images_in` raises. The sample at which a tar breaks off may lack members and is left out."""
    for where, members in groupby(_members(descriptor, name, container),
                                  key=lambda member: _split(member.name)[0]):
        yield StoredSample(where, where.removeprefix(f"{name}/"), {_split(m.name)[1]: m for m in members})


def _split(path: str) -> tuple[str, str]:
    folder, slash, file = path.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def _members(descriptor: int, name: str, container: Container) -> Iterator[StoredImage]:
    try:
        with os.fdopen(os.dup(descriptor), "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Otherwise every header stays in memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.isfile():
                    yield StoredImage(f"{name}/{member.name}", container, member.offset_data, member.size)
            stream.seek(tar.offset)
            if any(stream.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("bad header")  # tarfile itself takes a bad header for the end
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{name} is no whole uncompressed tar file ({error}): "
                         "copy or pack it again") from None
