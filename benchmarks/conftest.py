"""Runs cases under pytest-benchmark, prints lines below its table, and writes `report.html` here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from blip_bench.machine import machine
from blip_bench.memory import Added
from blip_bench.models import write_checkpoint
from blip_bench.peers.installed import chosen
from blip_bench.report import MemoryRecord, TimeRecord, write_report
from blip_bench.sides import dtypes_for
from blip_bench.timing import Case, Rounds

LINES = pytest.StashKey[list[str]]()
RECORDS = pytest.StashKey[list[TimeRecord | MemoryRecord]]()
REPORT = Path(__file__).with_name("report.html")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """`checkpoint("caption")` → a directory with that part of a random BLIP base, 384 px (`TASK_PARTS`)"""

    @cache
    def write(part: str) -> Path:
        directory = tmp_path_factory.mktemp(part)
        write_checkpoint(directory, part, 384)
        return directory

    return write


@pytest.fixture(scope="session")
def dtypes() -> list[str]:
    """The dtypes that the processor multiplies in hardware."""
    return dtypes_for("caption", None)


@pytest.fixture(scope="session")
def peers() -> list[str]:
    """The peers that are installed."""
    return [peer for peer, reason in chosen("caption", None).items() if reason is None]


@pytest.fixture
def side_by_side(benchmark, request) -> Callable[[Case, int], dict[str, Any]]:
    """`side_by_side(case, rounds)` → each call's last result, by name. pytest-benchmark's own figures are
    those of the case's first call. The other calls take their turn before each of its rounds; their figures
    are in `extra_info`."""

    def run(case: Case, rounds: int) -> dict[str, Any]:
        first, *others = case.calls
        case.get_warm()
        timed = Rounds(case)
        benchmark.pedantic(timed.take, args=(first,), setup=lambda: timed.take(*others), rounds=rounds)
        benchmark.extra_info.update(timed.summary())
        _keep(request, TimeRecord(*_place(request), timed.summary()))
        request.config.stash[LINES] += _lines(request.node.name, timed.summary())
        return timed.results

    return run


@pytest.fixture
def record_memory(request, record_line) -> Callable[[str, dict[str, Added]], None]:
    """`record_memory(case, {name: memory added})`."""

    def record(case: str, added: dict[str, Added]) -> None:
        _keep(request, MemoryRecord(*_place(request), case, added))
        record_line(f"{case}, peak memory: " + "; ".join(
            f"{name} adds {each.added / 1e9:.2f} GB to {each.before / 1e9:.2f}"
            for name, each in added.items()))

    return record


@pytest.fixture
def record_line(request) -> Callable[[str], None]:
    """`record_line(text)` prints a finding other than time below the table."""
    return request.config.stash[LINES].append


def _keep(request: pytest.FixtureRequest, record: TimeRecord | MemoryRecord) -> None:
    request.config.stash[RECORDS].append(record)


def _place(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    """The names of the module and the test, and the test's parameters."""
    node = request.node
    return node.module.__name__, node.originalname, dict(node.callspec.params) if hasattr(node,
                                                                                          "callspec") else {}


def _lines(name: str, summary: dict[str, Any]) -> list[str]:
    times = (f"{who} {each['seconds']['median']:.3g} s" for who, each in summary["implementations"].items())
    ratios = (f"{r['of']} {r['median']:.2f} × as fast as {r['beside']} ({r['lowest']:.2f}–{r['highest']:.2f})"
              for r in summary["ratios"])
    return [f"{name}: {'; '.join([*times, *ratios])}"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES], config.stash[RECORDS] = [], []


def pytest_report_header() -> str:
    about = machine()
    return f"torch {about['torch']}, {about['threads']} threads, {about['instructions']}, {about['cpu']}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if lines := config.stash[LINES]:
        terminalreporter.section("side by side: medians, and ratios (lowest–highest of the rounds)")
        for line in lines:
            terminalreporter.write_line(line)
    if records := config.stash[RECORDS]:
        terminalreporter.write_line(f"report: {write_report(records, REPORT)}")
