"""Independent work, one piece per core."""

import os
import signal
import threading

import pytest
import torch

from blip_fast.parallel.cores import each_on_a_core


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_in_order_and_each_on_one_thread(two_threads):
    meeting = threading.Barrier(2, timeout=60)  # two pieces run at a time, or this breaks

    def piece(number):
        meeting.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    found = each_on_a_core(piece, range(6))
    assert [number for number, *_ in found] == list(range(6))
    assert {(threads, gradients) for _, threads, gradients, _ in found} == {(1, False)}
    assert len({thread for *_, thread in found}) == 2 and torch.get_num_threads() == 2


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_are_as_the_caller_makes_them(two_threads, inference):
    with torch.inference_mode(inference):
        (found,) = each_on_a_core(lambda x: x + 1, [torch.ones(2)])
    assert found.is_inference() == inference and not found.requires_grad


def test_an_error_is_the_caller_s(two_threads):
    with pytest.raises(ZeroDivisionError):
        each_on_a_core(lambda x: 1 // x, [1, 0])


def test_threads_that_begin_later_have_the_callers_number(two_threads):
    each_on_a_core(str, [1, 2])
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_workers_of_its_own(two_threads):
    each_on_a_core(str, [1, 2])
    if (child := os.fork()) == 0:
        signal.alarm(60)  # or it would wait for threads that are not there
        os._exit(0 if each_on_a_core(str, [1, 2]) == ["1", "2"] else 1)
    assert os.waitpid(child, 0)[1] == 0
