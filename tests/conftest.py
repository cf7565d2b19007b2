"""Fixtures that every test may use."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Without a GPU Triton interprets its kernels on the CPU. It reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Photographs:
    """Real photographs with human captions, `flickr8k/annotations.jsonl` of the data directory."""

    root: Path
    paths: list[Path]
    captions: list[list[str]]  # several per photograph


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The directory that BLIP_FAST_DATA names; without it the test is skipped."""
    root = os.environ.get("BLIP_FAST_DATA")
    if not root:
        pytest.skip("BLIP_FAST_DATA is unset: no real photographs, captions or vocabulary to test with")
    return Path(root)


@pytest.fixture(scope="session")
def photographs(data_root: Path) -> Photographs:
    """All photographs of flickr8k in the data directory."""
    root = data_root / "flickr8k"
    rows = [json.loads(line) for line in (root / "annotations.jsonl").read_text(encoding="utf-8").splitlines()]
    return Photographs(root, [root / row["image"] for row in rows], [row["captions"] for row in rows])


@pytest.fixture(scope="session")
def bert_vocabulary(data_root: Path) -> Path:
    """bert-base-uncased's vocab.txt."""
    return data_root / "bert-base-uncased" / "vocab.txt"
