"""Files that list answers or labels."""

from __future__ import annotations

import json
from pathlib import Path


def read_list(path: str, what: str) -> list[str]:
    """A JSON list of strings (`.json`, as published for VQA's answers), or one a line; `what` names one in errors.

    Raises ValueError where the file is something else, or empty.
    """
    content = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix.lower() == ".json":
        try:
            entries = json.loads(content)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{path} is no JSON list of strings: name one, or a text file with one {what} a line")
    else:
        entries = [line.strip() for line in content.split("\n") if line.strip()]
    if not entries:
        raise ValueError(f"{path} holds no {what}")
    return entries
