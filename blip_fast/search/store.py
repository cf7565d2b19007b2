"""The index on disk: features in one append-only raw file, and SQLite for everything else.

    index.sqlite           facts about the index, its images (name, path, size, modification time, row), holes
    features.N.float32     [rows, width], row by row, little-endian (or `.float16`); N counts compactions
    broken.jsonl           images that could not be read, and the reasons

SQLite's transactions decide which rows count: features are on disk before their rows are committed, and bytes
after the committed rows are overwritten. So a process that is killed may leave an index without its last
images, but never one with half an image. A row that is no longer used is a hole until the file is compacted.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from blip_fast.checkpoint.files import whole_file
from blip_fast.data.shards.tars import LocalTar
from blip_fast.media.images import StoredImage

DATABASE = "index.sqlite"
BROKEN = "broken.jsonl"
STORAGES = ("float32", "float16")
FORMAT = 1
BLOCK = 4096  # rows that are in memory at a time: 4 MB at width 256, and twice that in float64

_SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # Names and paths are bytes, as in the file system. `length` is NULL for a whole file, `row` for a broken
    # image.
    "CREATE TABLE images (name BLOB PRIMARY KEY, path BLOB NOT NULL, start INTEGER NOT NULL, length INTEGER, "
    "bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, row INTEGER UNIQUE, error TEXT)",
    "CREATE TABLE holes (row INTEGER PRIMARY KEY)",
)


@dataclass(frozen=True)
class Version:
    """Identifies one state of an image. `mtime_ns` is the modification time of its file, or of its shard."""

    start: int
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, image: StoredImage) -> Version:
        """The current version of an image. Raises OSError if the file does not exist."""
        status = file_of(image).stat()
        return cls(image.start, image.size if is_member(image) else status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Entry:
    """An image to be stored. `result` is its features, float32 [width], or the reason why there are none."""

    image: StoredImage
    version: Version
    result: NDArray[np.float32] | str


class Store:
    """One index directory. Several processes may read it while one writes."""

    def __init__(self, directory: str | Path) -> None:
        """Open an index. Raises FileNotFoundError if there is none, ValueError if it is damaged or of another
        format."""
        self.directory = Path(directory)
        if not (self.directory / DATABASE).is_file():
            raise FileNotFoundError(f"{directory} holds no index: make one with `blip-fast search index`")
        # The thread that reads ahead looks up images too; sqlite3 itself serialises access.
        self._database = sqlite3.connect(self.directory / DATABASE, timeout=60, isolation_level=None,
                                         check_same_thread=False)
        try:
            self.facts = {name: json.loads(value)
                          for name, value in self._database.execute("SELECT * FROM facts")}
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{directory} holds no readable index ({error}): "
                             "remove it and index again") from None
        if self.facts.get("format") != FORMAT:
            raise ValueError(f"{directory} holds an index of format {self.facts.get('format')}, "
                             f"this program reads {FORMAT}: index again into another directory")
        self.width: int = self.facts["width"]
        self.dtype = np.dtype(self.facts["storage"]).newbyteorder("<")
        self._check_features()

    @classmethod
    def create(cls, directory: str | Path, width: int, storage: str, facts: dict[str, Any]) -> Store:
        """Make an empty index. Raises FileExistsError if there is one already, ValueError if the storage is
        unknown."""
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        path = Path(directory) / DATABASE
        if path.exists():
            raise FileExistsError(f"{directory} holds an index already: open it, or name another directory")
        facts = {**facts, "format": FORMAT, "width": width, "storage": storage, "rows": 0, "generation": 0}
        with whole_file(path) as partial, closing(sqlite3.connect(partial)) as database, database:
            for statement in _SCHEMA:
                database.execute(statement)
            database.executemany("INSERT INTO facts VALUES (?, ?)",
                                 ((k, json.dumps(v)) for k, v in facts.items()))
        return cls(directory)

    def close(self) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._one("SELECT count(row) FROM images")

    @property
    def row_count(self) -> int:
        """The number of rows of features, holes included."""
        return self._fact("rows")

    @property
    def generation(self) -> int:
        """The number of compactions so far. Rows keep their numbers within a generation."""
        return self._fact("generation")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock for writing. Raises ValueError if another process holds it."""
        try:
            with FileLock(self.directory / "writing.lock", timeout=0):
                yield
        except Timeout:
            raise ValueError(f"{self.directory} is being written by another process: "
                             "wait until it has ended") from None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads inside see the same state, whatever another process writes."""
        with self._transaction("DEFERRED"):
            yield

    def version(self, name: str) -> Version | None:
        """The stored version of an image with features; None for any other image."""
        found = self._database.execute(
            "SELECT start, bytes, mtime_ns FROM images WHERE name = ? AND row NOT NULL", [os.fsencode(name)]
        ).fetchone()
        return Version(*found) if found else None

    def holes(self) -> NDArray[np.int64]:
        """The rows that belong to no image, sorted."""
        return np.fromiter((row for row, in self._database.execute("SELECT row FROM holes ORDER BY row")),
                           np.int64)

    def images(self, rows: Iterable[int]) -> list[StoredImage]:
        """The image of each row. No row may be a hole."""
        found = (self._database.execute("SELECT name, path, start, length FROM images WHERE row = ?",
                                        [int(row)]).fetchone() for row in rows)
        return [_stored_image(os.fsdecode(name), Path(os.fsdecode(path)), start, length)
                for name, path, start, length in found]

    def blocks(self, first: int = 0) -> Iterator[tuple[int, NDArray]]:
        """Blocks (number of the first row, features [rows, width]) from row `first` on, each memory-mapped
        only while it is read."""
        rows = self.row_count
        for start in range(first, rows, BLOCK):
            yield start, np.memmap(
                self._features(), self.dtype, "r", start * self.width * self.dtype.itemsize,
                (min(BLOCK, rows - start), self.width))

    def rows(self, numbers: NDArray[np.int64]) -> NDArray:
        """The features [rows, width] of the given rows."""
        mapped = np.memmap(self._features(), self.dtype, "r", shape=(self.row_count, self.width))
        return np.asarray(mapped[numbers])

    def write(self, entries: Sequence[Entry]) -> None:
        """Store images, all or none of them, replacing images with the same names. Needs `writing`."""
        whole = [entry.result for entry in entries if not isinstance(entry.result, str)]
        rows = self.row_count
        if whole:
            self._append(rows, np.stack(whole))
        with self._transaction("IMMEDIATE"):
            for entry in entries:
                broken = isinstance(entry.result, str)
                self._forget(os.fsencode(entry.image.name))
                image, version = entry.image, entry.version
                self._database.execute(
                    "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [os.fsencode(image.name), os.fsencode(file_of(image)), image.start,
                     image.size if is_member(image) else None, version.bytes, version.mtime_ns,
                     None if broken else rows, printable(str(entry.result)) if broken else None])
                rows += not broken
            self._set_fact("rows", rows)

    def missing(self) -> Iterator[str]:
        """Names of images that are missing: the file is gone, or the shard was rewritten and the image has
        not been found in it since."""
        tars: dict[bytes, int | None] = {}  # modification times
        last = b""
        # In portions, so that no transaction stays open while the caller works.
        while names := self._database.execute(
                "SELECT name, path, length, mtime_ns FROM images WHERE name > ? ORDER BY name LIMIT 1000",
                [last]).fetchall():
            for name, path, length, mtime_ns in names:
                if length is None:
                    gone = _modification_time(path) is None
                else:
                    if path not in tars:
                        tars[path] = _modification_time(path)
                    gone = tars[path] != mtime_ns
                if gone:
                    yield os.fsdecode(name)
            last = names[-1][0]

    def drop(self, names: Iterable[str]) -> None:
        """Remove images. Needs `writing`."""
        with self._transaction("IMMEDIATE"):
            for name in names:
                self._forget(os.fsencode(name))

    def compact(self) -> None:
        """Write the features without holes, in the same order. Needs `writing`."""
        holes = self.holes()
        if not len(holes):
            return
        new = self._features(self.generation + 1)
        with new.open("wb") as stream:
            for first, block in self.blocks():
                low, high = np.searchsorted(holes, [first, first + len(block)])
                stream.write(np.delete(block, holes[low:high] - first, axis=0).tobytes())
            _sync(stream)
        with self._transaction("IMMEDIATE"):
            number, last = 0, -1
            # In ascending order each new number is free: it is at most the old one, and lower rows have moved
            # already.
            while kept := self._database.execute(
                    "SELECT row FROM images WHERE row > ? ORDER BY row LIMIT 1000", [last]).fetchall():
                for (last,) in kept:
                    self._database.execute("UPDATE images SET row = ? WHERE row = ?", [number, last])
                    number += 1
            self._database.execute("DELETE FROM holes")
            self._set_fact("rows", self.row_count - len(holes))
            self._set_fact("generation", self.generation + 1)
        for path in (*self.directory.glob("features.*"), *self.directory.glob("graph.*.*")):
            if path != new:
                path.unlink()

    def report_broken(self) -> int:
        """Write `broken.jsonl`, or remove it if no image is broken. Returns the number of its lines."""
        count = 0
        with whole_file(self.directory / BROKEN) as partial, partial.open("w", encoding="utf-8") as stream:
            for name, error in self._database.execute(
                    "SELECT name, error FROM images WHERE row IS NULL ORDER BY name"):
                stream.write(json.dumps({"image": os.fsdecode(name), "error": error}) + "\n")
                count += 1
        if not count:
            (self.directory / BROKEN).unlink()
        return count

    def _append(self, rows: int, features: NDArray[np.float32]) -> None:
        """Write after the committed rows, over anything that a killed process may have left there."""
        path = self._features()
        with path.open("r+b" if path.exists() else "w+b") as stream:
            stream.truncate(rows * self.width * self.dtype.itemsize)
            stream.seek(0, os.SEEK_END)
            stream.write(features.astype(self.dtype).tobytes())
            _sync(stream)

    def _forget(self, name: bytes) -> None:
        self._database.execute("INSERT INTO holes SELECT row FROM images WHERE name = ? AND row NOT NULL",
                               [name])
        self._database.execute("DELETE FROM images WHERE name = ?", [name])

    def _features(self, generation: int | None = None) -> Path:
        number = self.generation if generation is None else generation
        return self.directory / f"features.{number}.{self.facts['storage']}"

    def _check_features(self) -> None:
        path, needed = self._features(), self.row_count * self.width * self.dtype.itemsize
        there = path.stat().st_size if path.exists() else 0
        if there < needed:
            raise ValueError(f"{path} has {there:,} of {needed:,} bytes: "
                             "copy the index again, or remove it and index again")

    def _fact(self, name: str) -> int:
        return json.loads(self._one("SELECT value FROM facts WHERE name = ?", name))

    def _set_fact(self, name: str, value: int) -> None:
        self._database.execute("UPDATE facts SET value = ? WHERE name = ?", [json.dumps(value), name])

    def _one(self, statement: str, *values: Any) -> Any:
        return self._database.execute(statement, values).fetchone()[0]

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        try:
            self._database.execute(f"BEGIN {kind}")
            yield
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, or another process that does not end
            raise OSError(f"{self.directory / DATABASE}: {error}") from error
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")


def is_member(image: StoredImage) -> bool:
    """Whether the image is in a tar file."""
    return isinstance(image.where, LocalTar)


def file_of(image: StoredImage) -> Path:
    """The image's file, or the tar that holds it. For an image that cannot be had, its name as a path."""
    if isinstance(image.where, LocalTar):
        return image.where.path
    return image.where if isinstance(image.where, Path) else Path(image.name)


def printable(text: str) -> str:
    """The text as one line that any terminal and file can hold, with control characters and undecodable bytes
    escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _stored_image(name: str, path: Path, start: int, length: int | None) -> StoredImage:
    return StoredImage(name, path) if length is None else StoredImage(name, LocalTar(path), start, length)


def _modification_time(path: bytes) -> int | None:
    """A file's modification time in ns; None if there is no file."""
    try:
        return Path(os.fsdecode(path)).stat().st_mtime_ns
    except OSError:
        return None


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
