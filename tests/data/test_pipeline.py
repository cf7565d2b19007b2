"""The DALI input: compared with Pillow, complete and disjoint over ranks, seeded, resumable, robust to
damaged files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import odd_files
import pytest
import torch
from PIL import Image, ImageOps

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def

from blip_fast.data.input.augment import OUTCOMES, SHIFTS, apply_outcome, warp_matrices
from blip_fast.data.input.decoding import columns, decode
from blip_fast.data.input.graph import decoded_and_finished, one_operation
from blip_fast.data.input.pipeline import EvaluationInput, InputConfig, TrainInput
from blip_fast.data.input.sources import Source
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import iterate
from blip_fast.media.images import STD, evaluation_transform, load_image

PICTURES = 23
SIDE = 160  # of the picture to which RandAugment's operations are applied


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """23 pictures with three captions each, in shards of 5."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(PICTURES):
        odd_files.picture(40 + i, 50 - i, seed=i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [f"Picture ({i}), caption {c}." for c in range(3)]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(folder, folder / "rows.jsonl", folder / "shards", samples_per_shard=5)
    return str(folder / "shards")


@pytest.fixture
def config(shards: str) -> InputConfig:
    return InputConfig([Source("pictures", shards)], image_size=32, batch_size=4, shuffle_buffer=8, threads=1,
                       seed=5)


def colour_difference(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each image, on a scale of 0 to 255."""
    return ((ours - expected) * torch.tensor(STD).view(3, 1, 1) * 255).abs().mean((1, 2, 3))


def same(one, two) -> bool:
    return torch.equal(one.images, two.images) and (one.keys, one.captions) == (two.keys, two.captions)


def test_evaluation_is_within_two_levels_of_pillow(photographs, tmp_path) -> None:
    rows = [json.dumps({"image": str(path)}) for path in photographs.paths[-50:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    pack(photographs.root, tmp_path / "rows.jsonl", tmp_path / "shards")
    images = [load_image(sample.image) for sample in iterate(tmp_path / "shards")]
    for image_size in (96, 224):
        batches = list(EvaluationInput(tmp_path / "shards", image_size=image_size, batch_size=20, threads=1))
        ours = torch.cat([batch.images for batch in batches])
        assert ours.dtype == torch.float32 and ours.shape == (50, 3, image_size, image_size)
        assert colour_difference(ours, evaluation_transform(images, image_size)).max() < 2


def test_odd_files_are_decoded_as_pillow_decodes_them(tmp_path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, content in {**odd_files.good_files(), **odd_files.grey_files()}.items():
        (folder / name).write_bytes(content)
    pack(folder, None, tmp_path / "shards")
    (batch,) = EvaluationInput(tmp_path / "shards", image_size=40, batch_size=32, threads=1)
    expected = evaluation_transform([load_image(folder / record["image"]) for record in batch.records], 40)
    far = {
        r["image"]: d
        for r, d in zip(batch.records, colour_difference(batch.images, expected).tolist(), strict=True)
    }
    assert len(far) == len(odd_files.good_files()) + len(odd_files.grey_files())
    assert max(far.values()) < 2, far


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_everything_once_in_order(shards: str, world_size: int) -> None:
    keys, captions = [], []
    for rank in range(world_size):
        source = EvaluationInput(shards, image_size=16, batch_size=4, threads=1, rank=rank,
                                 world_size=world_size)
        batches = list(source)
        assert [len(batch.ids) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        assert sum(len(batch.images) for batch in batches) == source.samples
        keys += [key for batch in batches for key in batch.keys]
        captions += [caption for batch in batches for caption in batch.captions]
    assert keys == [f"{i:09d}" for i in range(PICTURES)]
    assert captions == [f"Picture ({i}), caption 0." for i in range(PICTURES)]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (2, 11), (3, 7)])
def test_ranks_share_an_epoch_without_repeats(config: InputConfig, world_size: int, batch_size: int) -> None:
    """Also when some ranks have exactly full batches and others one more image (2 × 11 or 3 × 7 of 23)."""
    config = replace(config, batch_size=batch_size, image_size=16)
    ranks = [TrainInput(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = []
    for epoch in range(3):
        batches = [batch for rank in ranks for batch in rank]
        keys = [key for batch in batches for key in batch.keys]
        assert (len(batches) == world_size * len(ranks[0])
                == world_size * (PICTURES // world_size // batch_size))
        # all but a partial batch on each rank
        assert len(set(keys)) == len(keys) == batch_size * len(batches)
        assert all(rank.epoch == epoch + 1 and rank.step == 0 for rank in ranks)
        orders.append(keys)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("shuffle_buffer", [1, 8, 100])
def test_without_a_partial_batch_an_epoch_is_complete(config: InputConfig, shuffle_buffer: int) -> None:
    source = TrainInput(replace(config, batch_size=1, shuffle_buffer=shuffle_buffer))
    for _ in range(2):
        assert sorted(key for batch in source for key in batch.keys) == [f"{i:09d}" for i in range(PICTURES)]


def test_batches(config: InputConfig, shards: str) -> None:
    records = {sample.key: sample.record for sample in iterate(shards)}
    for batch in TrainInput(replace(config, prompt="a picture of ", max_words=3)):
        assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.float32
        assert (batch.ids.dtype == torch.int64
                and batch.ids.tolist() == [records[key]["id"] for key in batch.keys])
        assert batch.records == [records[key] for key in batch.keys]
        assert batch.captions == [f"a picture of picture {int(key)} ," for key in batch.keys]


def test_each_epoch_draws_its_captions(config: InputConfig) -> None:
    source, drawn = TrainInput(config), {}
    for _ in range(8):
        for batch in source:
            for key, caption in zip(batch.keys, batch.captions, strict=True):
                drawn.setdefault(key, set()).add(caption)
    assert {len(captions) for captions in drawn.values()} <= {2, 3} and len(drawn) == PICTURES


def test_seed_and_rank_decide_everything(config: InputConfig) -> None:
    one, two, other = (list(TrainInput(c)) for c in (config, replace(config, threads=2),
                                                     replace(config, seed=6)))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert not any(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("consumed", [0, 2, 5, 7])
def test_resuming_gives_exactly_the_remaining_batches(config: InputConfig, consumed: int) -> None:
    """In the middle of an epoch, at its last batch (5 of 5), and in the second epoch."""

    def batches(source: TrainInput, count: int) -> list:
        found = []
        while len(found) < count:
            for batch in source:
                found.append(batch)
                if len(found) == count:
                    break
        return found

    first = TrainInput(config)
    batches(first, consumed)
    state = first.state_dict()
    expected = batches(first, 7)
    second = TrainInput(config)
    batches(second, 1)  # an input that was already used can be reset too
    second.load_state_dict(state)
    restored = batches(second, 7)
    assert all(same(a, b) for a, b in zip(expected, restored, strict=True))
    assert (first.epoch, first.step) == (second.epoch, second.step)


def test_state_fits_only_its_own_run(config: InputConfig, tmp_path) -> None:
    state = TrainInput(config).state_dict()
    torch.save(state, tmp_path / "state.pt")
    TrainInput(replace(config,
                       threads=2)).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for changed, words in [
        (TrainInput(config, rank=0, world_size=2), "world_size was 1, is 2"),
        (TrainInput(replace(config, shuffle_buffer=9)), "shuffle_buffer was 8, is 9"),
        (TrainInput(replace(config, sources=[Source("others", config.sources[0].root)])),
         "was pictures, is others"),
    ]:
        with pytest.raises(ValueError, match=words):
            changed.load_state_dict(state)


def test_a_damaged_image_costs_neither_the_batch_nor_the_run(
    config: InputConfig, shards: str, tmp_path
) -> None:
    """Bytes flipped on disk after packing. The decoder would refuse the file and fail the whole batch."""
    for path in Path(shards).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = next(sample for sample in iterate(tmp_path) if sample.key == "000000007")
    tar = tmp_path / "000001.tar"
    tar.write_bytes(tar.read_bytes().replace(victim.image[60:90], bytes(30)))
    damaged = replace(config, sources=[Source("pictures", str(tmp_path))])

    evaluation = EvaluationInput(tmp_path, image_size=16, batch_size=6, threads=1)
    keys = [key for batch in evaluation for key in batch.keys]
    assert keys == [f"{i:09d}" for i in range(PICTURES) if i != 7]

    train = TrainInput(damaged)
    for _ in range(3):
        for batch in train:
            assert len(batch.images) == len(batch.keys) == len(batch.captions) == 4
            assert "000000007" not in batch.keys
            # a replacement equals the sample it is taken from in every field
            for i, key in enumerate(batch.keys):
                j = batch.keys.index(key)
                assert torch.equal(batch.images[i], batch.images[j]) and batch.ids[i] == batch.ids[j]
    for source in (evaluation, train):
        assert [(line["image"], line["key"]) for line in source.quarantine] == [("7.png", "000000007")]
    with pytest.raises(RuntimeError, match="every image of a batch is damaged"):
        list(TrainInput(replace(damaged, batch_size=1)))


def test_broken_images_do_not_change_the_order_of_the_good_ones(config: InputConfig, tmp_path) -> None:
    """Images refused while packing, and images damaged on disk afterwards."""
    (tmp_path / "images").mkdir()
    good = [f"{i:02d}.png" for i in range(40)]
    for i, name in enumerate(good):
        odd_files.picture(30, 20, seed=i).save(tmp_path / "images" / name)
    for i in (3, 30):
        (tmp_path / "images" / f"{i:02d} broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")

    def packed(images: list[str], name: str) -> list[list[str]]:
        rows = "\n".join(json.dumps({"image": image, "caption": "a picture"}) for image in images)
        (tmp_path / "rows.jsonl").write_text(rows)
        pack(tmp_path / "images", tmp_path / "rows.jsonl", tmp_path / name, samples_per_shard=15)
        return read(name)

    def read(name: str) -> list[list[str]]:
        source = TrainInput(replace(config, sources=[Source("pictures", str(tmp_path / name))]))
        return [[record["image"] for record in batch.records] for _ in range(3) for batch in source]

    whole = packed(good, "whole")
    assert packed(sorted([*good, "03 broken.png", "30 broken.png"]), "refused") == whole
    victims = [sample for sample in iterate(tmp_path / "whole")
               if sample.record["image"] in ("07.png", "21.png")]
    for tar in (tmp_path / "whole").glob("*.tar"):
        content = tar.read_bytes()
        for victim in victims:
            content = content.replace(victim.image[50:80], bytes(30))
        tar.write_bytes(content)
    damaged, replaced = read("whole"), 0
    for batch, before in zip(damaged, whole, strict=True):
        for image, was in zip(batch, before, strict=True):
            assert image == was or was in ("07.png", "21.png")
            replaced += image != was
    assert replaced == 2 * 3


def test_bad_input_is_refused_at_once(config: InputConfig, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="blip-fast data pack"):
        TrainInput(replace(config, sources=[Source("pictures", str(tmp_path))]))
    with pytest.raises(ValueError, match="23 images give 2 ranks no full batch of 12"):
        TrainInput(replace(config, batch_size=12), world_size=2)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        TrainInput(config, rank=2, world_size=2)
    with pytest.raises(ValueError, match="crop_scale"):
        replace(config, crop_scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="there is no source"):
        InputConfig([])
    odd_files.picture().save(tmp_path / "a.png")
    pack(tmp_path, None, tmp_path / "shards")
    with pytest.raises(ValueError, match="1 images without a caption"):
        TrainInput(replace(config, sources=[Source("a", str(tmp_path / "shards"))], batch_size=1))


def test_crops_and_flips_are_what_they_say(tmp_path) -> None:
    """A horizontal ramp: the sign of its slope shows the flip, its size the width of the crop."""
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "ramp.png", "caption": "a ramp"}))
    pack(tmp_path, tmp_path / "rows.jsonl", tmp_path / "shards")
    plain = InputConfig([Source("ramp", str(tmp_path / "shards"))], 64, 1, crop_scale=None, flip=False,
                        rand_augment=False, threads=1)

    def slopes(config: InputConfig) -> np.ndarray:
        source = TrainInput(config)
        images = torch.cat([batch.images for _ in range(60) for batch in source])
        red = images[:, 0] * STD[0] * 255
        return (red[:, 32, 60] - red[:, 32, 3]).numpy() / 57 * 64 / 256  # share of the width, signed

    assert np.abs(slopes(plain) - 1).max() < 0.02
    flipped = slopes(replace(plain, flip=True))
    assert np.abs(np.abs(flipped) - 1).max() < 0.02 and 15 < (flipped < 0).sum() < 45
    cropped = slopes(replace(plain, crop_scale=(0.2, 0.5)))
    # Width = √(area × aspect ratio), with a ratio from 3/4 to 4/3.
    assert cropped.min() > 0.95 * np.sqrt(0.2 * 3 / 4) and cropped.max() < 1.05 * np.sqrt(0.5 * 4 / 3)
    assert cropped.max() - cropped.min() > 0.2


@pytest.fixture(scope="module", params=["on the CPU", "in DALI's graph"])
def operations(request) -> tuple[np.ndarray, np.ndarray]:
    """A picture, and each of the 40 outcomes applied to it."""
    pixels = np.asarray(odd_files.picture(SIDE, SIDE, seed=3)) // 2 + 40
    if request.param == "on the CPU":
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return pixels, np.stack([apply_outcome(image, outcome).transpose(1, 2, 0)
                                 for outcome in range(OUTCOMES)])

    @pipeline_def(batch_size=OUTCOMES, num_threads=1, device_id=None, enable_conditionals=True)
    def graph():
        image = fn.external_source(source=lambda: [pixels] * OUTCOMES, layout="HWC")
        return one_operation(image, fn.external_source(source=lambda: list(np.arange(OUTCOMES))), SIDE)

    pipeline = graph()
    pipeline.build()
    return pixels, pipeline.run()[0].as_array()


def test_the_graph_for_gpus_makes_the_same_images(config: InputConfig) -> None:
    """The graph, run on the CPU, applies the crops, flips and operations that were drawn, up to differences
    of DALI's own resize and warp."""
    items = TrainInput(replace(config, image_size=64)).items(0)
    ours = next(decode(iter([items]), 64, 4, True, 1, torch.device("cpu"))).images
    graph = decoded_and_finished(iter([columns(items, True)]), 64, True, "cpu", batch_size=4, num_threads=1,
                                 device_id=None)
    graph.build()
    theirs = torch.from_numpy(graph.run()[0].as_array())
    drawn = [drawn for item in items for drawn in item.drawn]
    assert len(set(drawn)) == 4 and any(each.flip for each in drawn)
    assert colour_difference(ours, theirs).max() < 2


def test_operations_are_what_they_say(operations) -> None:
    pixels, outcomes = operations
    image = Image.fromarray(pixels)
    for outcome, matrix in enumerate(warp_matrices(SIDE)):
        backwards = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        expected = image.transform(
            image.size, Image.Transform.AFFINE, backwards.ravel(), Image.Resampling.BILINEAR,
            fillcolor=(128,) * 3
        )
        inside = slice(30, 130)  # the edges, where the picture meets the fill, are rounded differently
        difference = np.abs(outcomes[outcome].astype(int) - np.asarray(expected))
        assert difference[inside, inside].max() <= 2 and difference.mean() < 1.5, outcome
    for outcome, (y, x) in enumerate(SHIFTS, start=6):
        padded = np.pad(pixels, ((5, 5), (5, 5), (0, 0)), constant_values=128)
        assert np.array_equal(outcomes[outcome], padded[5 + y :, 5 + x :][:SIDE, :SIDE])
    for outcome, expected in [(10, np.asarray(ImageOps.autocontrast(image))), (12, equalize(pixels))]:
        assert np.abs(outcomes[outcome].astype(int) - expected).max() <= 1
        assert np.array_equal(outcomes[outcome], outcomes[outcome + 1])


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Map each channel's value to the share of pixels that are darker or equal; the darkest value becomes
    0."""
    channels = []
    for channel in pixels.transpose(2, 0, 1):
        below = np.cumsum(np.bincount(channel.ravel(), minlength=256))
        darkest = below[channel.min()]
        channels.append(np.round(255 * (below - darkest) / (below[-1] - darkest))[channel])
    return np.stack(channels, axis=-1).astype(int)


def test_each_operation_has_its_share(operations) -> None:
    pixels, outcomes = operations
    changed = [not np.array_equal(outcome, pixels) for outcome in outcomes]
    assert changed == [True] * 14 + [False] * 26  # 7 of 10 operations, each with probability 1/2: 14 of 40
    matrices = warp_matrices(SIDE)
    assert np.allclose(matrices[2] @ [SIDE / 2, SIDE / 2, 1], SIDE / 2), "rotation keeps the centre"
    assert np.allclose(matrices[2, :, :2] @ matrices[5, :, :2], np.eye(2), atol=1e-6), "either sign"


def test_rand_augment_leaves_the_expected_share_alone(config: InputConfig) -> None:
    plain = replace(config, crop_scale=None, flip=False, rand_augment=False, batch_size=1)
    whole = {batch.keys[0]: batch.images for batch in TrainInput(plain)}
    source = TrainInput(replace(plain, rand_augment=True))
    drawn = [torch.equal(batch.images, whole[batch.keys[0]]) for _ in range(12) for batch in source]
    assert abs(np.mean(drawn) - 0.65**2) < 0.1  # 276 draws: 3 standard deviations
