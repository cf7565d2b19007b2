"""From shards to batches, by DALI: decode, crop, flip, RandAugment, normalise. On a GPU the decoding happens there.

`TrainInput` is endless training input, seeded, split over ranks and resumable in the middle of an epoch.
`EvaluationInput` reads every image once, in order. Captions leave as strings: whoever trains packs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali.backend import TensorListCPU
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from torch import Tensor

from blip_fast.data.graph import decoded_and_normalised
from blip_fast.data.shards import ShardIndex, read_index
from blip_fast.tokenizer import clean_caption


@dataclass(frozen=True)
class InputConfig:
    """What is read, and how images and captions are prepared (BLIP's pre-training unless changed)."""

    shards: list[str]  # directories that `blip-fast data pack` wrote
    image_size: int = 224
    batch_size: int = 32  # on each rank
    crop_scale: tuple[float, float] | None = (0.2, 1.0)  # share of the area that a crop keeps; None: the whole image
    flip: bool = True
    rand_augment: bool = True
    prompt: str = ""  # in front of every caption, as in captioning's fine-tuning
    max_words: int = 30
    shuffle_buffer: int = 4096  # encoded images in memory; each next one is drawn from them
    threads: int = 4
    seed: int = 0
    pairs: bool = False  # each sample is two images (NLVR2)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards is empty: name at least one directory that `blip-fast data pack` wrote")
        for name in ("image_size", "batch_size", "max_words", "shuffle_buffer", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}: it must be (least, most) with 0 < least ≤ most ≤ 1")


@dataclass(frozen=True)
class Batch:
    """images float32 [batch, 3, size, size], normalised, on the input's device, or [batch, 2, 3, size, size] of pairs;
    the rest has one entry an image or pair."""

    images: Tensor
    captions: list[str]  # one of each image's captions, cleaned, behind the prompt; "" where a question stands instead
    ids: Tensor  # int64 [batch], on the CPU: equal ids are the same image
    records: list[dict[str, Any]]  # key, image, all captions, and what else the annotations knew

    @property
    def keys(self) -> list[str]:
        return [record["key"] for record in self.records]


class TrainInput:
    """Training batches of one rank: iterating gives the rest of the current epoch, and the next call the next epoch.

    Every epoch reads the tars in another order, split evenly over the ranks, and shuffles within the buffer; the last,
    partial batch is dropped, so that every rank has `steps_per_epoch` full batches. An image that was damaged since it
    was packed is replaced by another of its batch, which keeps every rank's shapes, and listed in `quarantine`.

    Raises FileNotFoundError and ValueError for shards or sizes that cannot be trained on, before anything is read.
    """

    def __init__(self, config: InputConfig, *, rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu"):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} ranks: it must be 0 to {world_size - 1}")
        indices = [read_index(directory) for directory in config.shards]
        for directory, index in zip(config.shards, indices, strict=True):
            if index.without_caption:
                raise ValueError(f"{directory} holds {index.without_caption} images without a caption to train on")
            if config.pairs and index.pairs < index.samples:
                raise ValueError(f"{directory} holds {index.samples - index.pairs} samples without a second image: "
                                 'pack rows with "image" and "second_image"')
        samples = sum(index.samples for index in indices)
        self.steps_per_epoch = samples // world_size // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"{samples} images give {world_size} ranks no full batch of {config.batch_size}")
        # The reader pads each rank's share to full batches: those behind steps_per_epoch hold repeats.
        self._reader_steps = -(-samples // (world_size * config.batch_size))
        self.config, self.rank, self.world_size, self.device = config, rank, world_size, torch.device(device)
        self.epoch = self.step = 0
        self.quarantine: list[dict[str, str]] = []
        self._indices = indices
        self._pipeline = self._build()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        while self.step < self.steps_per_epoch:
            images, records, good = _run(self._pipeline)
            self.step += 1
            yield self._batch(images, records, good)
        for _ in range(self._reader_steps - self.steps_per_epoch):
            self._pipeline.run()
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """This rank's position, to save with `torch.save`. It fits only the same data, ranks and options."""
        return {"epoch": self.epoch, "step": self.step, "origin": self._origin(), "dali": self._pipeline.checkpoint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch at which `state` was taken: the remaining batches are exactly the same.

        Raises ValueError naming what differs: DALI itself would go on in a wrong order without an error.
        """
        origin = self._origin()
        if differing := [name for name in origin if origin[name] != state["origin"].get(name)]:
            changes = ", ".join(f"{name} was {state['origin'].get(name)}, is {origin[name]}" for name in differing)
            raise ValueError(f"the input's position cannot be restored: {changes}")
        self.epoch, self.step = state["epoch"], state["step"]
        self._pipeline = self._build(state["dali"])

    def _origin(self) -> dict[str, Any]:
        """Everything that the order of images and the random operators depend on."""
        options = {name: value for name, value in asdict(self.config).items() if name not in ("shards", "threads")}
        content = "".join(shard.sha256 for index in self._indices for shard in index.shards)
        shards = hashlib.sha256(content.encode()).hexdigest()  # wherever they lie
        return {**options, "rank": self.rank, "world_size": self.world_size, "shards": shards}

    def _build(self, checkpoint: bytes | None = None) -> Pipeline:
        config = self.config
        return _build_pipeline(
            config.shards,
            self._indices,
            config.image_size,
            self.device,
            crop_scale=config.crop_scale,
            flip=config.flip,
            augment=config.rand_augment,
            pairs=config.pairs,
            # The order of the tars must be the same on every rank, all else differs.
            reader={
                "random_shuffle": True,
                "initial_fill": config.shuffle_buffer,
                "shuffle_after_epoch": True,
                "shuffle_after_epoch_seed": config.seed,
                "shard_id": self.rank,
                "num_shards": self.world_size,
            },
            batch_size=config.batch_size,
            num_threads=config.threads,
            seed=int(np.random.SeedSequence([config.seed, self.rank]).generate_state(1)[0] >> 1),
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )

    def _batch(self, images: Tensor, records: list[dict[str, Any]], good: list[bool]) -> Batch:
        if not all(good):
            _report(self.quarantine, records, good)
            if not any(good):
                raise RuntimeError(f"every image of a batch is damaged, {records[0]['key']} the first: pack them again")
            source = [i if fine else good.index(True) for i, fine in enumerate(good)]
            images, records = images[source], [records[i] for i in source]
        return Batch(images, [self._caption(record) for record in records], _ids(records), records)

    def _caption(self, record: dict[str, Any]) -> str:
        if not record["captions"]:
            return ""
        # Drawn anew for each epoch, alike on any number of ranks.
        draw = np.random.default_rng([self.config.seed, self.epoch, record["crc32"]])
        caption = record["captions"][draw.integers(len(record["captions"]))]
        return self.config.prompt + clean_caption(caption, self.config.max_words)


class EvaluationInput:
    """Every image once, in order, resized and normalised (within 2/255 of Pillow's bicubic); ranks share them out.

    Damaged images are left out and listed in `quarantine`; the last batch may be smaller. `captions` are the images'
    first, as written: the rest is in `records`.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        image_size: int,
        batch_size: int,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ):
        indices = [read_index(directory) for directory in shards]
        samples = sum(index.samples for index in indices)
        # As the reader shares them out: rank r has the images from ⌊samples × r / ranks⌋ on.
        self.samples = samples * (rank + 1) // world_size - samples * rank // world_size
        self.batch_size = batch_size
        self.quarantine: list[dict[str, str]] = []
        self._options = (shards, indices, image_size, torch.device(device))
        self._reader = {"shard_id": rank, "num_shards": world_size}
        self._threads = threads

    def __iter__(self) -> Iterator[Batch]:
        pipeline = _build_pipeline(
            *self._options, reader=self._reader, batch_size=self.batch_size, num_threads=self._threads
        )
        for start in range(0, self.samples, self.batch_size):
            images, records, good = _run(pipeline)
            real = self.samples - start  # the last batch is filled up with repeats
            _report(self.quarantine, records[:real], good[:real])
            kept = [i for i, fine in enumerate(good[:real]) if fine]
            records = [records[i] for i in kept]
            captions = [record["captions"][0] if record["captions"] else "" for record in records]
            yield Batch(images[kept], captions, _ids(records), records)


def _build_pipeline(
    shards: Sequence[str | Path],
    indices: Sequence[ShardIndex],
    image_size: int,
    device: torch.device,
    *,
    reader: dict[str, Any],
    crop_scale: tuple[float, float] | None = None,
    flip: bool = False,
    augment: bool = False,
    pairs: bool = False,
    **options: Any,
) -> Pipeline:
    tars = [Path(d) / shard.file for d, index in zip(shards, indices, strict=True) for shard in index.shards]
    on_gpu = device.type == "cuda"
    pipeline = decoded_and_normalised(
        {**reader, "paths": [str(tar) for tar in tars], "index_paths": [str(tar.with_suffix(".idx")) for tar in tars]},
        image_size,
        "mixed" if on_gpu else "cpu",
        crop_scale,
        flip,
        augment,
        pairs,
        device_id=(device.index or 0) if on_gpu else None,
        **options,
    )
    pipeline.build()
    return pipeline


def _run(pipeline: Pipeline) -> tuple[Tensor, list[dict[str, Any]], list[bool]]:
    images, records, good = pipeline.run()
    assert isinstance(records, TensorListCPU) and isinstance(good, TensorListCPU)
    tensor = to_torch_tensor(images.as_tensor(), copy=True)
    return tensor, [json.loads(records.at(i).tobytes()) for i in range(len(records))], good.as_array().tolist()


def _report(quarantine: list[dict[str, str]], records: list[dict[str, Any]], good: list[bool]) -> None:
    reason = "damaged since it was packed: its checksum differs"
    for record, fine in zip(records, good, strict=True):
        line = {"image": record["image"], "key": record["key"], "reason": reason}
        if not fine and line not in quarantine:
            quarantine.append(line)


def _ids(records: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([record["id"] for record in records], dtype=torch.int64)
