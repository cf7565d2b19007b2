"""Fixtures that every test may use."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from blip_fast.inference import precision

# Without a GPU Triton interprets its kernels on the CPU. It reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def precision_is_said_anew():
    """As in a process of its own, where it is said once."""
    precision.say.cache_clear()


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


@pytest.fixture(scope="session")
def cleaners(tmp_path_factory) -> Path:
    """A directory with a small `captioner` and `filter` for `blip-fast capfilt`."""
    from capfilt_runs import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def web_shards(tmp_path_factory) -> Path:
    """Shards of pictures with web captions."""
    from capfilt_runs import save_shards

    return save_shards(tmp_path_factory.mktemp("shards") / "web")


@pytest.fixture(scope="session")
def cleaned(cleaners: Path, web_shards: Path, tmp_path_factory) -> Path:
    """What an undisturbed run of `blip-fast capfilt` makes of `web_shards` by the `cleaners`."""
    from capfilt_runs import arguments

    from blip_fast.cli import main

    output = tmp_path_factory.mktemp("whole") / "clean"
    assert main(arguments(cleaners, web_shards, "--output", output)) == 0
    return output
