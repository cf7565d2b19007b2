"""Fetches remote shards by fsspec and keeps verified local copies, which all processes of a machine share."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout

from blip_fast.data.shards.shards import OpenShard, Shard, member_index, sha256_of

CACHE = "~/.cache/blip_fast/shards"
ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubles with each attempt


@dataclass(frozen=True)
class ShardCache:
    """A directory of about `limit` bytes. Its files are named by content (`SHA256.tar`), so it serves any URL
    and is never out of date. The tars that were opened longest ago are removed first; an open tar stays
    readable.
    """

    directory: Path
    limit: int

    def open(self, url: str, shard: Shard) -> OpenShard:
        """The shard at `url`, fetched unless a whole copy is here. One process fetches, others wait for it.

        Raises FileNotFoundError if there is nothing at `url`, and OSError if fetching failed for good: the
        file was cut short, its bytes are not the packed ones, or there was no connection in ATTEMPTS
        attempts.
        """
        tar = self.directory / f"{shard.sha256}.tar"
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock(tar):
            if not tar.is_file() or tar.stat().st_size != shard.bytes:
                self._fetch(url, shard, tar)
            os.utime(tar)
            opened = OpenShard(tar, url)
        self._make_room(tar)
        return opened

    def _fetch(self, url: str, shard: Shard, tar: Path) -> None:
        for attempt in range(ATTEMPTS):
            try:
                return self._copy(url, shard, tar)
            except FileNotFoundError:
                raise FileNotFoundError(f"{url} is missing, though its shards.json lists it: "
                                        "upload it again") from None
            except (PermissionError, ImportError) as error:  # fsspec says which package a protocol needs
                raise OSError(f"{url} cannot be fetched: {error}") from error
            except Exception as error:  # each protocol's client has its own errors
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"{url} was not fetched in {ATTEMPTS} attempts: {error}") from error
                time.sleep(FIRST_PAUSE * 2**attempt)

    def _copy(self, url: str, shard: Shard, tar: Path) -> None:
        """Copy under another name, verify size and checksum, and only then rename."""
        part = tar.with_suffix(f".{os.getpid()}.part")
        try:
            system, path = fsspec.url_to_fs(url)
            system.get_file(path, str(part))
            if part.stat().st_size != shard.bytes:
                raise OSError(f"it has {part.stat().st_size:,} of {shard.bytes:,} bytes: upload it again")
            if sha256_of(part) != shard.sha256:
                raise OSError("its SHA-256 is not the one in shards.json: upload it again")
            tar.with_suffix(".idx").write_text(member_index(part), encoding="utf-8")
            part.replace(tar)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        files = []
        for path in (*self.directory.glob("*.tar"), *self.directory.glob("*.part")):
            with suppress(FileNotFoundError):  # another process may be making room too
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != newest:
                # Skip a file that is in use, or open on Windows.
                with suppress(Timeout, PermissionError), self._lock(path, seconds=0):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".idx").unlink(missing_ok=True)
                    excess -= size

    def _lock(self, path: Path, seconds: float = -1) -> FileLock:
        """The file's lock, one of 256 lock files that are never removed. Waits at most `seconds`; −1 waits
        forever."""
        return FileLock(self.directory / f"{path.name[:2]}.lock", timeout=seconds)


def shard_cache(directory: str, gigabytes: float) -> ShardCache:
    return ShardCache(Path(directory).expanduser(), int(gigabytes * 1e9))
