"""One batch ahead: order, the position that belongs to the batch taken, errors, the time that was waited."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from blip_train.batches import Batches
from blip_train.pretraining import Batch

from blip_fast.tokenizer import BERT_TOKENS, Tokenizer

TOKENIZER = Tokenizer([*BERT_TOKENS, *"abcdefg"])


class Source:
    """Two epochs of three batches; each takes `seconds`, and the one numbered `broken` cannot be read."""

    def __init__(self, seconds=0.0, broken=None):
        self.seconds, self.broken, self.taken = seconds, broken, 0

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
    return Batches(source, collate, torch.device("cpu"))


def test_order_and_positions():
    source = Source()
    batches = batches_of(source)
    assert batches.state == {"taken": 0}
    for i in range(1, 8):  # beyond an epoch's end
        batch = next(batches)
        assert batch.ids.tolist() == [i, 0] and batch.images[0, 0] == i and len(batch.texts) == 2
        assert batches.state == {"taken": i}
    batches.close()
    assert source.taken == 8  # the one that nobody took


def test_a_batch_that_is_ready_is_not_waited_for():
    batches = batches_of(Source(seconds=0.2))
    next(batches)
    first = batches.waited
    assert first > 0.1
    time.sleep(0.5)
    next(batches)
    assert batches.waited - first < 0.1
    next(batches)
    assert batches.waited - first > 0.1
    batches.close()


def test_an_error_reaches_the_taker():
    batches = batches_of(Source(broken=2))
    next(batches)
    with pytest.raises(RuntimeError, match="every image of a batch is damaged"):
        next(batches)
    batches.close()
