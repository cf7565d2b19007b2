"""Implementations timed side by side: in turn, in one process, so that whatever else the machine does meets them alike.

Each round calls every peer and then ours; the ratio of one round is a peer's seconds over ours. A benchmark also
compares what they computed: a speed-up counts only for equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def side_by_side(benchmark, request) -> Callable[..., dict[str, Any]]:
    """`side_by_side(ours, {name: peer}, rounds)` → what each returned last, by name, ours as "ours"."""

    def run(ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], rounds: int,
            warm_up: int = 1) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        results = {}

        def call_peers() -> None:
            for name, peer in peers.items():
                start = perf_counter()
                results[name] = peer()
                seconds[name].append(perf_counter() - start)

        results["ours"] = benchmark.pedantic(ours, setup=call_peers, rounds=rounds, warmup_rounds=warm_up)
        if benchmark.enabled:
            own = benchmark.stats.stats.data
            compared = {name: _ratio(taken[-rounds:], own) for name, taken in seconds.items()}
            benchmark.extra_info["peers"] = compared
            request.config.stash[LINES].append(_line(request.node.name, median(own), compared))
        return results

    return run


@pytest.fixture
def record_line(request) -> Callable[[str], None]:
    """`record_line(text)` puts a finding of another kind than time below the table."""
    return request.config.stash[LINES].append


def _ratio(peer: list[float], own: list[float]) -> dict[str, float]:
    ratios = [theirs / ours for theirs, ours in zip(peer, own, strict=True)]
    return {"seconds": median(peer), "ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _line(name: str, seconds: float, compared: dict[str, dict[str, float]]) -> str:
    peers = (f"{peer} {r['seconds']:.3g} s, {r['ratio']:.2f} × ({r['lowest']:.2f}–{r['highest']:.2f})"
             for peer, r in compared.items())
    return f"{name}: ours {seconds:.3g} s; {'; '.join(peers)}"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []


def pytest_report_header() -> str:
    return (f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := terminalreporter.config.stash[LINES]:
        terminalreporter.section("side by side: medians, and the ratio peer / ours (lowest–highest of the rounds)")
        for line in lines:
            terminalreporter.write_line(line)
