"""Re-ranking compared with the published loop, 1/k of the work for both (all of it: -m slow), and memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from blip_bench.cases import rerank
from blip_bench.memory import added_memory
from blip_bench.models import load_transformers
from blip_bench.timing import Call

from blip_fast.tasks.matcher import Matcher


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", rerank.TARGETS)
def test_reranking(side_by_side, checkpoint, k, full):
    """In bfloat16."""
    cases = rerank.cases(checkpoint("match"), "bfloat16", full)
    side_by_side(next(case for case in cases if case.name.startswith(f"k = {k},")), 1)


def test_peak_memory(checkpoint, record_memory):
    added = {side: added_memory(reranking_alone, side, checkpoint("match"))
             for side in ("ours bfloat16", "published loop bfloat16")}
    record_memory("re-ranking, k = 64", added)


def reranking_alone(side: str, directory: Path) -> Call:
    matcher = Matcher.from_pretrained(directory, dtype="bfloat16", device="cpu")
    work = rerank.make_work(matcher, 64, rerank.IMAGES)
    if side.startswith("ours"):
        return partial(rerank.rerank, matcher, work)
    return partial(rerank.published_loop, load_transformers(directory, "bfloat16"), work)
