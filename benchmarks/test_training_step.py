"""A pre-training step of the base model at 224 px (losses and gradients), compared with the published
algorithm in plain code: the textbook model of tests/reference. Its five padded passes project keys and values
again for each text, gather the negatives' images, and hold full attention weights, similarities and logits.
Both have the same weights, batch, queue (57,600) and negatives; neither has dropout or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import blip_kernels.flops  # noqa: F401 (what our ops count)
import pytest
import torch
from blip_bench.memory import added_memory
from blip_bench.timing import Case
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from reference import pretraining as textbook
from reference.model import Sizes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip_fast.checkpoint.names import original_layout
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig
from blip_fast.model.packed_texts import PackedTexts

PADDED, ALPHA = 30, 0.4  # captions are padded to 30 tokens, as published
# With 8 pairs, the costs that do not depend on the batch (casts of weights, EMA, gradients of embeddings)
# weigh heavily. The paper has 75 pairs per GPU.
CASES = [pytest.param("float32", 8, marks=pytest.mark.slow), ("bfloat16", 8),
         pytest.param("bfloat16", 32, marks=pytest.mark.slow)]
LENGTHS = (14, 11, 17, 13, 12, 19, 10, 15)  # with [CLS] and [SEP]: lengths as in COCO and on the web
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
Step = Callable[[], dict[str, Tensor]]


def make_ours(pairs: int) -> tuple[Pretraining, Batch]:
    torch.manual_seed(0)
    ours = Pretraining(BlipModel(BlipConfig(text=TextConfig(dropout=0.0))), Objective(), seed=0)
    texts = [[101, *torch.randint(1000, 30000, (length - 2,)).tolist(), 102]
             for length in LENGTHS * (pairs // len(LENGTHS))]
    return ours, Batch(torch.randn(pairs, 3, 224, 224), PackedTexts.from_lists(texts), torch.arange(pairs))


def make_textbook(ours: Pretraining, batch: Batch) -> tuple[textbook.TextbookPretraining, textbook.Batch]:
    """The textbook model with the product's weights and queue, and the batch padded for it."""
    layout = original_layout(ours.model.config)
    theirs = textbook.TextbookPretraining(Sizes())
    state = layout.split(dict(ours.model.state_dict()))
    state |= layout.stored_twice(state)
    state |= {name: value for name, value in theirs.state_dict().items() if name.endswith("position_ids")}
    theirs.load_weights({name: state[name] for name in theirs.state_dict() if name in state})
    theirs.image_queue.copy_(ours.queue.image.T)
    theirs.text_queue.copy_(ours.queue.text.T)
    ids, mask = batch.texts.to_padded(0)
    padding = (0, PADDED - ids.shape[1])
    return theirs, textbook.Batch(batch.images, torch.nn.functional.pad(ids, padding),
                                  torch.nn.functional.pad(mask, padding).long())


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def our_step(ours: Pretraining, batch: Batch, precision: str,
             drawn: list[textbook.Negatives]) -> dict[str, Tensor]:
    """Run a step with its backward; return the losses. `drawn` receives the negatives, always the same."""
    torch.manual_seed(1)
    ours.zero_grad()
    ours.follow()
    with autocast(precision):
        output = ours(batch, StepContext(alpha=ALPHA))
    output.total.backward()
    ours.enqueue(output)
    assert output.negatives is not None
    drawn[:] = [textbook.Negatives(*output.negatives)]
    return output.losses


def their_step(theirs: textbook.TextbookPretraining, batch: textbook.Batch, precision: str,
               drawn: list[textbook.Negatives]) -> dict[str, Tensor]:
    theirs.zero_grad()
    with autocast(precision):
        output = theirs.step([batch], ALPHA, drawn)
    output.loss.backward()
    return {"itc": output.itc[0], "itm": output.itm[0], "lm": output.lm[0]}


@pytest.mark.parametrize(("precision", "pairs"), CASES)
def test_training_step(side_by_side, precision, pairs):
    """Compared with the published algorithm in the same precision and, for 8 pairs, in float32 (its own)."""
    ours, batch = make_ours(pairs)
    theirs, padded = make_textbook(ours, batch)
    drawn: list[textbook.Negatives] = []
    step = partial(our_step, ours, batch, precision, drawn)
    losses = step()
    peers = {f"published, {own}": partial(their_step, theirs, padded, own, drawn)
             for own in dict.fromkeys([precision, *["float32"] * (pairs == 8)])}
    for name, loss in peers[f"published, {precision}"]().items():
        torch.testing.assert_close(losses[name].float(), loss.float(), rtol=TOLERANCES[precision],
                                   atol=0, msg=name)
    case = Case.beside(f"{pairs} pairs, {precision}", step, peers, amount=pairs, unit="pairs",
                       warm_up=lambda: None)
    side_by_side(case, 2)


@pytest.mark.parametrize(("precision", "pairs"), CASES)
def test_peak_memory(precision, pairs, record_memory):
    """Memory that a step adds to what stays (weights, momentum copy, queue): activations and gradients."""
    added = {side: added_memory(step_alone, side, precision, pairs) for side in ("ours", "published")}
    record_memory(f"a step of {pairs} pairs, {precision}", added)
    assert added["ours"].added < added["published"].added


def step_alone(side: Literal["ours", "published"], precision: str, pairs: int) -> Callable[[], object]:
    """One side's step, with nothing of the other side in memory. It clears its gradients."""
    ours, batch = make_ours(pairs)
    drawn = [textbook.Negatives(torch.arange(1, pairs + 1) % pairs, torch.arange(1, pairs + 1) % pairs)]
    step: Step = partial(our_step, ours, batch, precision, drawn)
    model: torch.nn.Module = ours
    if side == "published":
        theirs, padded = make_textbook(ours, batch)
        step, model = partial(their_step, theirs, padded, precision, drawn), theirs

    def step_and_clear() -> None:
        step()
        model.zero_grad()

    return step_and_clear


def test_flops(record_line):
    pairs = len(LENGTHS)
    ours, batch = make_ours(pairs)
    theirs, padded = make_textbook(ours, batch)
    drawn: list[textbook.Negatives] = []
    counted = {}
    for side, step in {"ours": partial(our_step, ours, batch, "bfloat16", drawn),
                       "published": partial(their_step, theirs, padded, "bfloat16", drawn)}.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counted[side] = counter.get_total_flops() / pairs / 1e9
    record_line("a step's GFLOP a pair: "
                f"{', '.join(f'{side} {count:.1f}' for side, count in counted.items())}")
