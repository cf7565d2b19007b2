"""Unusable batches are left out, a run that sees no others ends, and SIGTERM is noticed."""

import os
import signal

import pytest
import torch
from blip_train.engine.agreement import Agreement


def losses(value: float) -> dict[str, torch.Tensor]:
    return {"itc": torch.tensor(1.0, requires_grad=True), "lm": torch.tensor(value, dtype=torch.bfloat16)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_out_and_counted(bad):
    agreement = Agreement(patience=2)
    answers = [agreement.accepts(losses(value)) for value in (1.0, bad, bad, 2.0, bad, bad, 3.0)]
    assert answers == [True, False, False, True, False, False, True] and agreement.skipped == 4


def test_patience_ends():
    agreement = Agreement(patience=1)
    assert not agreement.accepts(losses(float("nan")))
    with pytest.raises(ValueError, match=r"2 batches in a row .*itc 1, lm nan.*lower schedule.lr"):
        agreement.accepts(losses(float("nan")))


def test_sigterm_is_noticed_at_the_next_batch_and_no_longer_than_listened():
    before = signal.getsignal(signal.SIGTERM)
    agreement = Agreement(patience=0)
    with agreement.listening():
        assert agreement.accepts(losses(1.0)) and not agreement.stopping
        os.kill(os.getpid(), signal.SIGTERM)
        assert agreement.accepts(losses(1.0)) and agreement.stopping
    assert signal.getsignal(signal.SIGTERM) is before
