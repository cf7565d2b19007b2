"""Reading one batch ahead: order, the position of the batch that was taken, errors, and the waiting time."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from blip_train.engine.batches import Batches
from blip_train.engine.step_slots import Streams
from blip_train.steps.pretraining import Batch
from patience import until

from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer

TOKENIZER = Tokenizer([*BERT_TOKENS, *"abcdefg"])


class Source:
    """Two epochs of three batches. Each takes `seconds`; batch number `broken` cannot be read."""

    def __init__(self, seconds=0.0, broken=None):
        self.seconds, self.broken, self.taken = seconds, broken, 0
        self.rank = self.epoch = 0

    @property
    def step(self):
        return self.taken

    def state_dict(self):
        return {"taken": self.taken}

    def __iter__(self):
        for _ in range(3):
            time.sleep(self.seconds)
            self.taken += 1
            if self.taken == self.broken:
                raise RuntimeError("every image of a batch is damaged")
            yield SimpleNamespace(images=torch.full((2, 3), float(self.taken)), captions=["a b", "c"],
                                  ids=torch.tensor([self.taken, 0]))


def batches_of(source):
    collate = partial(Batch.collate, tokenizer=TOKENIZER, max_tokens=30)
    return Batches(source, collate, torch.device("cpu"), seed=0)


def test_order_and_positions():
    source = Source()
    batches = batches_of(source)
    assert batches.state == {"taken": 0}
    for i in range(1, 8):  # beyond an epoch's end
        batch, _ = next(batches)
        assert batch.ids.tolist() == [i, 0] and batch.images[0, 0] == i and len(batch.texts) == 2
        assert batches.state == {"taken": i}
    batches.close()
    assert source.taken == 8  # the one that nobody took


def test_a_batch_that_is_ready_is_not_waited_for():
    batches = batches_of(Source(seconds=1.0))
    next(batches)
    first = batches.waited
    assert first > 0.5
    until(batches._next.done)
    next(batches)
    assert batches.waited - first < 0.5
    next(batches)
    assert batches.waited - first > 0.5
    batches.close()


def test_an_error_reaches_the_taker():
    batches = batches_of(Source(broken=2))
    next(batches)
    with pytest.raises(RuntimeError, match="every image of a batch is damaged"):
        next(batches)
    batches.close()


def test_a_batch_brings_a_seed_of_its_position_alone():
    def seeds(source, count):
        batches = batches_of(source)
        drawn = [next(batches).seed for _ in range(count)]
        batches.close()
        return drawn

    whole, later = Source(), Source()
    later.taken = 2
    drawn = seeds(whole, 5)
    assert len(set(drawn)) == 5 and seeds(later, 3) == drawn[2:]
    other = Source()
    other.rank = 1
    assert not set(seeds(other, 5)) & set(drawn)


def test_slots_keep_their_streams_on_any_number_of_ranks():
    def streams_of_slots(ranks):
        layout = Streams(slots=8, streams=4, ranks=ranks)
        return [stream for rank in range(ranks) for stream in layout.of_rank(rank)]

    assert streams_of_slots(1) == streams_of_slots(2) == streams_of_slots(4) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match=r"8 ranks cannot share 4 reader\(s\) of the data evenly: set "
                                          "runtime.ranks"):
        Streams(slots=8, streams=4, ranks=8)
    with pytest.raises(ValueError, match="4 readers cannot fill the 6 batches of a step"):
        Streams(slots=6, streams=4, ranks=2)
