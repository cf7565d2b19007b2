"""A JSON Lines file of results, written row by row, from which an interrupted run can be resumed."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout


class JsonLines:
    """Appends rows to a file, each by one write. A signal leaves whole lines; a kill may truncate the last.

    While the file is open, `FILE.lock` next to it keeps other processes out. `precision` is written to every
    row as `dtype`, unless it is None.
    """

    def __init__(self, path: str | Path, resume: bool, text: str = "prompt") -> None:
        """Open the file. With `resume` its rows are kept, and `done` identifies them by `image` and, if a row
        has it, by the key that `text` names. A truncated last line is removed.

        Raises:
            FileExistsError: the file exists, and `resume` is not set.
            ValueError: a whole line is not a JSON object; another process is writing the file.
        """
        self.path = Path(path)
        if self.path.exists() and not resume:
            raise FileExistsError(f"{path} exists: go on with it (--resume), remove it or name another file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"{path} is being written by another process: wait until that has "
                             "ended") from None
        self._file = self.path.open("ab", buffering=0)
        try:
            self.done, self.precision, size = _read_done(self.path, text)
            self._file.truncate(size)
        except BaseException:
            self.close()
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Append a row. Raises OSError if it could not be written completely."""
        # A file name that is not UTF-8 contains surrogates; Python escapes them as JSON does.
        marked = row if self.precision is None else {**row, "dtype": self.precision}
        line = json.dumps(marked, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: no room for a whole row; make some and go on with --resume")

    def close(self) -> None:
        self._file.close()
        self._lock.release()


class DoneRows:
    """Which images have a row already, in 16 bytes per row. Rows are compared by a 64-bit hash of `image`
    and, if a row has one, its text. Work that is wanted twice needs two rows.
    """

    def __init__(self, digests: array[int], in_tars: Counter[str]) -> None:
        """`digests` holds the `digest` of every row, `in_tars` the number of rows per tar under a URL."""
        self._names, self._left = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
        self.count, self.in_tars = len(digests), in_tars

    def take(self, image: str, text: str | None) -> bool:
        """Take a row of this image and text. Returns whether there was one that had not been taken."""
        wanted = np.uint64(digest(image, text))
        at = int(self._names.searchsorted(wanted))
        if at == len(self._names) or self._names[at] != wanted or self._left[at] == 0:
            return False
        self._left[at] -= 1
        return True


def digest(image: str, text: str | None) -> int:
    both = image if text is None else f"{image}\0{text}"
    return int.from_bytes(blake2b(both.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _read_done(path: Path, text: str) -> tuple[DoneRows, str | None, int]:
    """The rows of a file, their precision, and the number of bytes of its whole lines."""
    digests, in_tars, precision, size = array("Q"), Counter[str](), None, 0
    with path.open("rb") as file:
        for row, end in _rows(file, path):
            size = end
            image = str(row.get("image"))
            digests.append(digest(image, row.get(text)))
            precision = row.get("dtype", precision)
            if "://" in image:
                in_tars[image.rpartition("/")[0]] += 1
    return DoneRows(digests, in_tars), precision, size


def _rows(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The row of each whole line, and the number of bytes up to the line's end."""
    size = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        size += len(line)
        row = json_object(line)
        if row is None:
            raise ValueError(f"{path}, line {number} is no JSON object: this is not a file to resume from")
        yield row, size


def json_object(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None if it is something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
