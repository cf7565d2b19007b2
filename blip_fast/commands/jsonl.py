"""A JSON Lines file that grows while the work goes on and from which it can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonLines:
    """Rows appended to a file, each on the disk's side of Python's buffers as soon as it is written."""

    def __init__(self, path: str | Path, resume: bool) -> None:
        """Open the file. With `resume` its rows stay, in `rows`, and a last line that was cut short is removed.

        Raises:
            FileExistsError: the file is there and `resume` is not asked for.
            ValueError: a line before the last is no JSON object.
        """
        path = Path(path)
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists: go on with it (--resume), remove it or name another file")
        self.rows: list[dict[str, Any]] = []
        whole = b""
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            self.rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object: this is not a file to resume from")
    return row
