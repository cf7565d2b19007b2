"""Files with a list of answers or labels."""

from __future__ import annotations

import json
from pathlib import Path


def read_list(path: str, what: str) -> list[str]:
    """Read a JSON list of strings (`.json`, as published for VQA's answers) or a text file with one per line.
    Errors call an entry `what`.

    Raises ValueError if the file is neither, or empty.
    """
    content = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix.lower() == ".json":
        try:
            entries = json.loads(content)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{path} is no JSON list of strings: name one, or a text file with one "
                             f"{what} a line")
    else:
        entries = [line.strip() for line in content.split("\n") if line.strip()]
    if not entries:
        raise ValueError(f"{path} holds no {what}")
    return entries
