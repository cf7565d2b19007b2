"""A process that reads images: `python readers.py dali|pillow SHARDS plain|augmented`. Each line on standard
input is a number of images to read. It answers with the CPU seconds of itself and its workers so far."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from blip_bench.baselines.pillow_loader import batches
from torch import Tensor

from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source

IMAGE_SIZE, BATCH, WORKERS = 224, 32, 2


def ours(shards: Path, augment: bool) -> Iterator[Tensor]:
    """Endless batches of our training input. Both sides shuffle the whole data set."""
    source = TrainInput(InputConfig([Source("photographs", str(shards))], image_size=IMAGE_SIZE,
                                    batch_size=BATCH, threads=WORKERS, rand_augment=augment))
    while True:
        yield from (batch.images for batch in source)


def main() -> None:
    kind, shards, augment = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "augmented"
    torch.set_num_threads(1)
    images = ours(shards, augment) if kind == "dali" else batches(shards, IMAGE_SIZE, BATCH, WORKERS, augment)
    process = psutil.Process()
    for line in sys.stdin:
        left = int(line)
        while left > 0:
            left -= len(next(images))
        times = [each.cpu_times() for each in (process, *process.children())]
        print(sum(time.user + time.system for time in times), flush=True)


if __name__ == "__main__":
    main()
