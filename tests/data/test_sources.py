"""Several sources in every batch: the sizes of their shares, their separate epochs, and exact resumes."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import odd_files
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")
from blip_fast.data.input.order import Order
from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source, batch_shares
from blip_fast.data.shards.shards import Sample, write_shards

COUNTS = {"human": 12, "web": 31, "synthetic": 23}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Shards of 5 samples for each source; all keys are different."""
    folder, seed, directories = tmp_path_factory.mktemp("sources"), 0, {}
    for name, count in COUNTS.items():
        samples = []
        for i in range(count):
            seed += 1
            image = odd_files.encoded(odd_files.picture(40, 30, seed=seed), "PNG")
            samples.append(Sample(f"{name}{i:02d}", image, {"captions": [f"{name} {i}", "other"]}))
        directories[name] = folder / name
        write_shards(samples, folder / name, samples_per_shard=5)
    return directories


def config(roots: dict[str, Path], weights: dict[str, float | None], **options) -> InputConfig:
    sources = [Source(name, str(roots[name]), weight) for name, weight in weights.items()]
    return InputConfig(sources, **({"image_size": 16, "batch_size": 10, "shuffle_buffer": 12, "threads": 1}
                                   | options))


def take(source: TrainInput, count: int) -> list:
    def endless():
        while True:
            yield from source

    return list(islice(endless(), count))


def test_every_batch_holds_each_source_by_its_weight(roots) -> None:
    source = TrainInput(config(roots, {"human": 3, "web": 6, "synthetic": 1}))
    for batch in take(source, 9):
        assert Counter(batch.sources) == {"human": 3, "web": 6, "synthetic": 1}
        assert all(key.startswith(name) for key, name in zip(batch.keys, batch.sources, strict=True))
        assert batch.images.shape == (10, 3, 16, 16)


def test_each_source_goes_round_by_itself(roots) -> None:
    """12 samples at 3 per batch last 4 batches, 31 at 6 per batch last 5; none repeats before that."""
    source = TrainInput(config(roots, {"human": 3, "web": 6, "synthetic": 1}))
    assert source.steps_per_epoch == sum(COUNTS.values()) // 10
    keys = [batch.keys for batch in take(source, 20)]
    for name, per_batch, batches in (("human", 3, 4), ("web", 6, 5)):
        own = [[key for key in batch if key.startswith(name)] for batch in keys]
        for start in range(0, 20, batches):
            epoch = [key for batch in own[start : start + batches] for key in batch]
            assert len(set(epoch)) == len(epoch) == per_batch * batches
        assert own[:batches] != own[batches : 2 * batches]


def test_without_weights_sources_are_in_proportion_to_their_samples(roots) -> None:
    (batch,) = take(TrainInput(config(roots, dict.fromkeys(COUNTS))), 1)
    assert Counter(batch.sources) == {"human": 2, "web": 5, "synthetic": 3}  # 1.8, 4.7 and 3.5 of 10


def test_resuming_is_exact_in_the_middle_of_all_epochs(roots, tmp_path) -> None:
    mixed = config(roots, {"human": 0.3, "web": 0.6, "synthetic": 0.1}, crop_scale=(0.3, 1.0))
    for consumed in (0, 3, 7, 13):
        first = TrainInput(mixed)
        take(first, consumed)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = TrainInput(mixed)
        take(second, 2)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for a, b in zip(take(first, 8), take(second, 8), strict=True):
            assert torch.equal(a.images, b.images) and (a.keys, a.captions) == (b.keys, b.captions)
        assert (first.epoch, first.step) == (second.epoch, second.step) == divmod(consumed + 8, 6)


def test_what_differs_is_named(roots) -> None:
    weights = {"human": 3, "web": 7}
    state = TrainInput(config(roots, weights)).state_dict()
    for changed, words in [
        ({"human": 4, "web": 6},
         "human's images of a batch was 3, is 4, web's images of a batch was 7, is 6"),
        ({"human": 3, "web": 6, "synthetic": 1}, "sources was human, web, is human, web, synthetic"),
        ({"human": 3}, "web's shards was [0-9a-f]{64}, is None"),
    ]:
        with pytest.raises(ValueError, match=words):
            TrainInput(config(roots, changed)).load_state_dict(state)
    other = replace(config(roots, weights), sources=[Source("human", str(roots["synthetic"]), 3),
                                                     Source("web", str(roots["web"]), 7)])
    with pytest.raises(ValueError, match="human's shards was"):
        TrainInput(other).load_state_dict(state)


def test_a_sample_is_drawn_alike_whichever_share_reads_it(roots) -> None:
    """So a run continues with the same pictures on another number of ranks."""

    def first_epoch(ranks: int) -> dict[str, torch.Tensor]:
        alone = config(roots, {"human": None}, batch_size=1)
        inputs = [TrainInput(alone, rank=rank, world_size=ranks) for rank in range(ranks)]
        batches = [batch for each in inputs for batch in take(each, COUNTS["human"] // ranks)]
        return {batch.keys[0]: batch.images for batch in batches}

    alone, shared = first_epoch(1), first_epoch(3)
    assert alone.keys() == shared.keys() and len(alone) == COUNTS["human"]
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_mixes_that_cannot_be_are_refused(roots) -> None:
    for weights, batch_size, words in [
        ({"human": 1, "web": None}, 10, "sources web have no weight and others do"),
        ({"human": 99, "web": 1}, 10, r"source web has 0.1 images of a batch of 10, rounded to none"),
        ({"human": 14, "web": 1}, 30, "source human: 12 images give 1 ranks no full batch of 28"),
        ({"human": -1, "web": 1}, 10, "weight of source human is -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            TrainInput(config(roots, weights, batch_size=batch_size))
    with pytest.raises(ValueError, match="different names: a stands twice"):
        InputConfig([Source("a", "x"), Source("a", "y")])
    with pytest.raises(ValueError, match="source a has no root"):
        Source("a", "")


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_are_rounded_by_largest_remainder(weights: list[float], batch_size: int) -> None:
    exact = np.array(weights) / sum(weights) * batch_size
    sources = [Source(str(i), "x", weight) for i, weight in enumerate(weights)]
    try:
        shares = batch_shares(sources, [1] * len(weights), batch_size)
    except ValueError:
        assert exact.min() < 1
        return
    assert sum(shares) == batch_size
    assert np.abs(np.array(shares) - exact).max() < 1
    rounded_up = [e % 1 for e, share in zip(exact, shares, strict=True) if share > e]
    rounded_down = [e % 1 for e, share in zip(exact, shares, strict=True) if share < e]
    assert not rounded_up or not rounded_down or min(rounded_up) >= max(rounded_down) - 1e-9


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 5),
       st.integers(1, 40))
def test_an_order_is_complete_and_knows_its_shards_ahead(counts, world_size, per_batch, buffer) -> None:
    shares = [Order(counts, per_batch, buffer, (3, 1), rank, world_size) for rank in range(world_size)]
    for epoch in range(2 if shares[0].steps else 0):
        seen = []
        for share in shares:
            for step in range(epoch * share.steps, (epoch + 1) * share.steps):
                places = share.batch(step)
                assert {shard for shard, _ in places} <= set(share.shards_ahead(step))
                assert all(0 <= sample < counts[shard] for shard, sample in places)
                seen += places
        assert (len(set(seen)) == len(seen)
                == world_size * per_batch * (sum(counts) // world_size // per_batch))


def test_a_buffer_of_one_keeps_neighbours_together() -> None:
    """Twins are neighbours in their shard, and a batch of even size must hold both."""
    order = Order([10, 20, 10], 4, 1, (0, 0), 1, 2)
    for number in range(3 * order.steps):
        places = order.batch(number)
        assert all(twin == (shard, sample + 1) and sample % 2 == 0
                   for (shard, sample), twin in zip(places[::2], places[1::2], strict=True))
