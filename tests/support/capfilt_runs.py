"""Helpers for tests of `blip-fast capfilt`: two small models, shards of pictures, a run folder's content."""

from __future__ import annotations

from pathlib import Path

import odd_files
import pytest
from hf_models import save_model, small_tokenizer

from blip_fast.data.shards.shards import Sample, iterate, write_shards

pq = pytest.importorskip("pyarrow.parquet", reason="capfilt needs the extra `capfilt`")
pytest.importorskip("nvidia.nvimgcodec", reason="packing needs the extra `train`")

CAPTIONS = [["two dogs run over the green grass"], [], ["a man rides a horse", "a red ball"],
            ["people eat!"], ["..."]]
SHARDS, IMAGES = 3, 5  # images per shard


def picture(number: int) -> bytes:
    return odd_files.encoded(odd_files.picture(60, 40, seed=number), "JPEG")


def save_models(directory: Path, filter_seed: int = 3) -> Path:
    save_model("BlipForConditionalGeneration", small_tokenizer(), directory / "captioner",
               sep_bias=4.0, seed=2)
    save_model("BlipForImageTextRetrieval", small_tokenizer(), directory / "filter", seed=filter_seed)
    return directory


def save_shards(directory: Path) -> Path:
    samples = (Sample(f"{i:03d}", picture(i),
                      {"image": f"images/{i}.jpg", "captions": CAPTIONS[i % IMAGES], "note": i})
               for i in range(SHARDS * IMAGES))
    write_shards(samples, directory, samples_per_shard=IMAGES)
    return directory


def arguments(models: Path, *more: object) -> list[str]:
    return ["capfilt", "--captioner", str(models / "captioner"), "--filter", str(models / "filter"),
            "--dtype", "float32", "--max-length", "10", "--batch-size", "2", *map(str, more)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files except locks and those that contain the folder's own name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"}


def texts_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "texts").to_pylist()


def samples_of(folder: Path) -> list[Sample]:
    return [sample for part in (folder, folder / "dropped") for sample in iterate(part)]
