"""Small versions of VisDial's published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VISDIAL: dict[str, Any] = {"version": "1.0", "split": "val", "data": {
    "questions": ["is it red?", "where is it?", "how many?"], "answers": ["no", "on the grass", "two", "red"],
    "dialogs": [
        {"image_id": 7, "caption": "a dog", "dialog": [
            {"question": 1, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1},
            {"question": 0, "answer": 0, "answer_options": [3, 2, 0], "gt_index": 2}]},
        {"image_id": 123, "caption": "two dogs", "dialog": [
            {"question": 2, "answer": 2, "answer_options": [2, 0, 3], "gt_index": 0}]}]}}
DENSE = [{"image_id": 7, "round_id": 2, "gt_relevance": [0.0, 0.5, 1.0]},
         {"image_id": 123, "round_id": 1, "gt_relevance": [0, 0, 0]}]


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)
