"""A JSON Lines file that grows while the work goes on and from which it can be resumed."""

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
    """Rows appended to a file, each by one write: a signal leaves whole lines, a kill at worst a last line cut short.

    `FILE.lock` next to it keeps other processes out while it is open. `precision` is that of the rows, in each of them
    `dtype`; None for a file without one.
    """

    def __init__(self, path: str | Path, resume: bool, text: str = "prompt") -> None:
        """Open the file. With `resume` its rows stay, and `done` knows them by `image` and, where a row has one, the
        key that `text` names; a last line that was cut short is removed.

        Raises:
            FileExistsError: the file is there and `resume` is not asked for.
            ValueError: a line before the last is no JSON object; another process is writing the file.
        """
        self.path = Path(path)
        if self.path.exists() and not resume:
            raise FileExistsError(f"{path} exists: go on with it (--resume), remove it or name another file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"{path} is being written by another process: wait until that has ended") from None
        self._file = self.path.open("ab", buffering=0)
        try:
            self.done, self.precision, size = _read(self.path, text)
            self._file.truncate(size)
        except BaseException:
            self.close()
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Raises OSError where the row could not be written whole."""
        # A file name that is not UTF-8 comes with surrogates; Python's escape of one is JSON's.
        marked = row if self.precision is None else {**row, "dtype": self.precision}
        line = json.dumps(marked, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: no room for a whole row; make some and go on with --resume")

    def close(self) -> None:
        self._file.close()
        self._lock.release()


class DoneRows:
    """Which images have a row: 16 bytes each. Two names in 2⁶⁴ are taken for each other.

    What is compared is `image` and, where a row has one, its text. A row that is wanted twice needs two.
    """

    def __init__(self, digests: array[int], in_tars: Counter[str]) -> None:
        """Args: `digest` of every row; the number of rows of each tar under a URL."""
        self._names, self._left = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
        self.count, self.in_tars = len(digests), in_tars

    def take(self, image: str, text: str | None) -> bool:
        """Whether there is a row that was not taken before; it is then."""
        wanted = np.uint64(digest(image, text))
        at = int(self._names.searchsorted(wanted))
        if at == len(self._names) or self._names[at] != wanted or self._left[at] == 0:
            return False
        self._left[at] -= 1
        return True


def digest(image: str, text: str | None) -> int:
    both = image if text is None else f"{image}\0{text}"
    return int.from_bytes(blake2b(both.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _read(path: Path, text: str) -> tuple[DoneRows, str | None, int]:
    """What is done, in which precision, and how many bytes are whole lines."""
    digests, in_tars, precision, size = array("Q"), Counter[str](), None, 0
    with path.open("rb") as stream:
        for row, end in _rows(stream, path):
            size = end
            image = str(row.get("image"))
            digests.append(digest(image, row.get(text)))
            precision = row.get("dtype", precision)
            if "://" in image:
                in_tars[image.rpartition("/")[0]] += 1
    return DoneRows(digests, in_tars), precision, size


def _rows(stream: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line's row, and the bytes up to its end."""
    size = 0
    for number, line in enumerate(stream, 1):
        if not line.endswith(b"\n"):
            return
        size += len(line)
        row = json_object(line)
        if row is None:
            raise ValueError(f"{path}, line {number} is no JSON object: this is not a file to resume from")
        yield row, size


def json_object(line: str | bytes) -> dict[str, Any] | None:
    """The object that a line holds; None where it is something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
