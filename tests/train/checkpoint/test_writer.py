"""Checkpoints written in the background: the run continues, a second save waits,
and errors are raised later."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from blip_train.checkpoint import writer as writers
from blip_train.checkpoint.writer import Writer


@pytest.fixture
def engine():
    """The attributes of DeepSpeed's engine that a writer reads, in a group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(checkpoint_engine=SimpleNamespace())
    dist.destroy_process_group()


def test_the_run_goes_on_with_a_copy(engine, tmp_path, monkeypatch):
    on_disk, latest = threading.Event(), []
    monkeypatch.setattr(writers, "_to_disk", lambda file: on_disk.wait(20))
    writer, state = Writer(engine, background=True), {"weight": torch.ones(3), "step": 1}
    engine.checkpoint_engine.save(state_dict=state, path=str(tmp_path / "a.pt"))  # as DeepSpeed calls it
    writer.finish(nullcontext, lambda: latest.append("a"))
    state["weight"].zero_()
    writer.check()
    assert not latest  # still being written
    threading.Timer(0.3, on_disk.set).start()
    writer.wait()
    assert latest == ["a"] and torch.equal(torch.load(tmp_path / "a.pt")["weight"], torch.ones(3))
    writer.close()


def test_what_failed_in_the_thread_is_raised_once(engine, tmp_path):
    writer, latest = Writer(engine, background=True), []
    writer.put(torch.ones(3), tmp_path / "nowhere" / "a.pt")
    writer.finish(nullcontext, lambda: latest.append("a"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        writer.wait()
    writer.check()
    writer.close()
    assert not latest


def test_at_once_it_is_the_latest_when_finish_returns(engine, tmp_path):
    writer, latest = Writer(engine, background=False), []
    writer.put(torch.ones(3), tmp_path / "a.pt")
    writer.finish(nullcontext, lambda: latest.append("a"))
    assert latest == ["a"] and torch.equal(torch.load(tmp_path / "a.pt"), torch.ones(3))
