"""Images per second of the training input compared with a DataLoader with Pillow: the same shards, work and
cores, each side in its own process, in turn. Both have a few batches ready when their turn comes, the
DataLoader twice as many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_bench.baselines.pillow_loader import STD, Choices, transform
from blip_bench.timing import Case
from PIL import Image
from readers import BATCH, IMAGE_SIZE

from blip_fast.data.input.augment import Drawn
from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source
from blip_fast.data.shards.pack import pack
from blip_fast.media.images import load_image

READERS = Path(__file__).with_name("readers.py")
IMAGES = {"photographs": 2000, "mosaics": 800}  # per round
ROUNDS = 3
BROKEN = 0.05
OUTCOMES = {  # the operation and sign of each of our outcomes
    **{3 * i + j: (name, sign) for i, sign in enumerate((1, -1)) for j, name in
       enumerate(("shear x", "shear y", "rotate"))},
    6: ("translate x", 1), 7: ("translate x", -1), 8: ("translate y", 1), 9: ("translate y", -1),
    10: ("auto contrast", 1), 11: ("auto contrast", 1), 12: ("equalize", 1), 13: ("equalize", 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The photographs of Flickr8k, and mosaics of them of 1,200 × 900 pixels."""
    root = os.environ.get("BLIP_FAST_DATA")
    if not root:
        pytest.skip("BLIP_FAST_DATA is unset: no photographs to measure with")
    folder, source = tmp_path_factory.mktemp("images"), Path(root) / "flickr8k"
    rows = [json.loads(line) for line in (source / "annotations.jsonl").read_text().splitlines()]
    paths = [source / row["image"] for row in rows if row["split"] == "train"]
    for kind in IMAGES:
        (folder / kind).mkdir()
    for path in paths:
        (folder / "photographs" / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(0)
    for i in range(200):
        mosaic = Image.new("RGB", (1200, 900))
        for place, which in enumerate(rng.choice(len(paths), 36, replace=False)):
            mosaic.paste(load_image(paths[which]).resize((200, 150)), (place % 6 * 200, place // 6 * 150))
        mosaic.save(folder / "mosaics" / f"{i:03d}.jpg", quality=90)
    return folder


def shards_of(images: Path, name: str, broken: float = 0) -> Path:
    """Pack images into shards. Before, a share `broken` of the files is truncated; after, a share `broken` of
    the packed images is overwritten."""
    shards, rng = images.parent / name, np.random.default_rng(1)
    files = sorted(images.iterdir())
    rows = [json.dumps({"image": file.name, "caption": "a picture"}) for file in files]
    for which in rng.choice(len(files), round(broken * len(files)), replace=False):
        content = files[which].read_bytes()
        files[which].write_bytes(content[: len(content) // 2])
    (images.parent / f"{name}.jsonl").write_text("\n".join(rows))
    report = pack(images, images.parent / f"{name}.jsonl", shards)
    assert report.quarantined == round(broken * len(files))
    with (shards / "000000.tar").open("r+b") as tar:
        lines = (shards / "000000.idx").read_text().splitlines()[1:]
        for which in rng.choice(len(lines), round(broken * len(lines)), replace=False):
            tar.seek(int(lines[which].split()[1 if lines[which].startswith("jpg") else 5]) + 100)
            tar.write(bytes(500))
    return shards


@contextmanager
def reader(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A running `readers.py` that has read its first batches."""
    command = [sys.executable, str(READERS), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        read(process, 20 * BATCH)
        yield process
        process.kill()


def read(process: subprocess.Popen[str], images: int) -> float:
    """Let the process read images. Returns its CPU seconds so far."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{images}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@pytest.fixture
def compare(side_by_side, benchmark, record_line) -> Callable[..., None]:
    """`compare(case, images, our reader's arguments, peer, its reader's arguments)`: wall and CPU seconds."""

    def run(case: str, images: int, ours: tuple[object, ...], name: str, peer: tuple[object, ...]) -> None:
        with reader(*ours) as one, reader(*peer) as other:
            spent = read(one, BATCH), read(other, BATCH)
            results = side_by_side(
                Case.beside(case, lambda: read(one, images), {name: lambda: read(other, images)},
                            amount=images, unit="images", warm_up=lambda: None), ROUNDS)
        seconds = results["ours"] - spent[0], results[name] - spent[1]
        benchmark.extra_info["CPU"] = {"ours": seconds[0], name: seconds[1], "ratio": seconds[1] / seconds[0]}
        record_line(f"{case}: {name} takes {seconds[1] / seconds[0]:.2f} × our CPU seconds")

    return run


@pytest.mark.parametrize("augment", ["plain", "augmented"])
@pytest.mark.parametrize("kind", ["photographs", pytest.param("mosaics", marks=pytest.mark.slow)])
def test_input_beside_a_data_loader(compare, folder, kind, augment):
    shards = folder / f"{kind} packed"
    if not shards.exists():
        shards_of(folder / kind, shards.name)
    assert difference(shards, augment == "augmented") < 1.5
    compare(f"{kind}, {augment}", IMAGES[kind], ("dali", shards, augment), "Pillow",
            ("pillow", shards, augment))


@pytest.mark.slow
def test_broken_images_and_speed(compare, folder):
    """5 % refused during packing and 5 % damaged on disk later, compared with our input on whole images."""
    whole, broken = folder / "whole packed", folder / "broken packed"
    shards_of(folder / "photographs", whole.name)
    shards_of(folder / "photographs", broken.name, BROKEN)
    compare("broken photographs", IMAGES["photographs"], ("dali", broken, "augmented"), "whole images",
            ("dali", whole, "augmented"))


def difference(shards: Path, augment: bool) -> float:
    """Mean absolute difference (of 255) from what the DataLoader makes of the same images and choices."""
    source = TrainInput(InputConfig([Source("a", str(shards))], image_size=IMAGE_SIZE,
                                    batch_size=BATCH, threads=1, rand_augment=augment))
    images = [transform(load_image(item.encoded[0].tobytes()), choices(item.drawn[0]), IMAGE_SIZE)
              for item in source.items(0)]
    batch = next(iter(source))
    return ((torch.stack(images) - batch.images) * STD * 255).abs().mean().item()


def choices(drawn: Drawn) -> Choices:
    (y, x), (height, width) = drawn.start, drawn.shape
    operations = [OUTCOMES[outcome] for outcome in drawn.outcomes if outcome in OUTCOMES]
    return Choices((x, y, x + width, y + height), drawn.flip, operations)
