"""Images in webdataset tar files, near or far: listed from the headers, read when they are needed."""

from __future__ import annotations

import os
import tarfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip_fast.data.cache import ShardCache
from blip_fast.data.shards import OpenShard, Shard
from blip_fast.images import SUFFIXES, Container, StoredImage


@dataclass(frozen=True)
class LocalTar:
    """A tar file that this machine's file system holds."""

    path: Path

    def read(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    def images(self) -> Iterator[StoredImage]:
        """Its images, named TAR/MEMBER. Raises what `images_in` raises."""
        with self.path.open("rb") as stream:
            yield from images_in(stream.fileno(), str(self.path), self)


class RemoteTar:
    """A tar file under a URL; each process that reads it fetches it into its machine's cache first."""

    def __init__(self, url: str, shard: Shard, cache: ShardCache) -> None:
        self.url, self.shard, self._cache = url, shard, cache
        self._opened: OpenShard | None = None
        self._lock = threading.Lock()

    def fetch(self) -> OpenShard:
        """Open it; it stays readable until this object goes, whatever the cache removes. Raises what
        `ShardCache.open` raises."""
        with self._lock:
            if self._opened is None:
                self._opened = self._cache.open(self.url, self.shard)
                weakref.finalize(self, self._opened.close)
            return self._opened

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.fetch().fileno(), size, start)

    def images(self) -> Iterator[StoredImage]:
        """As `LocalTar.images`, named URL/MEMBER."""
        yield from images_in(self.fetch().fileno(), self.url, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTar, (self.url, self.shard, self._cache)


def images_in(descriptor: int, name: str, container: Container) -> Iterator[StoredImage]:
    """The image members of an open tar, read from its headers alone.

    Raises ValueError where it is no whole uncompressed tar file, behind the images that are whole.
    """
    try:
        with os.fdopen(os.dup(descriptor), "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue], else every header stays in memory
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield StoredImage(f"{name}/{member.name}", container, member.offset_data, member.size)
            stream.seek(tar.offset)
            if any(stream.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("bad header")  # tarfile takes it for the end
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{name} is no whole uncompressed tar file ({error}): copy or pack it again") from None
