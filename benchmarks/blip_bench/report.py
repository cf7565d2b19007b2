"""The HTML page of a benchmark run: targets, comparisons, throughput by batch and beams, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from blip_bench.machine import machine
from blip_bench.memory import Added
from blip_fast.report import Bars, Metric, Plot, Report


class TimeRecord(NamedTuple):
    """The times of a test. Tests whose `parameters` have `batch` and `beams` form one plot with a line per
    number of beams."""

    module: str
    test: str
    parameters: dict[str, Any]
    summary: dict[str, Any]  # of `Rounds`


class MemoryRecord(NamedTuple):
    """The memory of a test's implementations, by name."""

    module: str
    test: str
    parameters: dict[str, Any]
    case: str
    added: dict[str, Added]


Record = TimeRecord | MemoryRecord


def write_report(records: Sequence[Record], path: Path) -> Path:
    about = machine()
    facts = {"Processor": about["cpu"], "Threads": f"{about['threads']} of {about['cores']} cores",
             "Instructions": about["instructions"], "PyTorch": about["torch"]}
    report = Report("Benchmarks",
                    "blip_fast and others, in turn in one process. Medians of the rounds.", facts)
    times = [record for record in records if isinstance(record, TimeRecord)]
    if targets := [metric for record in times for metric in _targets(record.summary)]:
        about_targets = "How many times as fast, and how many it should be."
        report.section("What is to be reached", about_targets).metrics(targets)
    for module, own in groupby(times, key=lambda record: record.module):
        own = list(own)
        sweep = [record for record in own if {"batch", "beams"} <= record.parameters.keys()]
        others = [record.summary for record in own if record not in sweep]
        report.section(_heading(module))
        report.plots([*_bars(_heading(module), others), *([_sweep(sweep)] if sweep else [])])
        if others:
            report.table(["case", "by", "seconds", "lowest", "highest", "a second", ""], list(_rows(others)))
    if memory := [record for record in records if isinstance(record, MemoryRecord)]:
        groups = {record.case: {name: each.added / 1e9 for name, each in record.added.items()}
                  for record in memory}
        report.section("Memory",
                       "What a call adds, at its peak, to the resident memory of a process of its own.")
        report.plots([Bars("Added by a call", groups, "GB")])
    return report.write(path)


def _heading(module: str) -> str:
    return module.removeprefix("test_").replace("_", " ").capitalize()


def _targets(summary: dict[str, Any]) -> Iterable[Metric]:
    for ratio in summary["ratios"]:
        if "target" in ratio:
            yield Metric(f"{summary['case']}: {ratio['of']}", ratio["median"], ratio["target"],
                         unit=f"× as fast as {ratio['beside']}")


def _bars(heading: str, summaries: Sequence[dict[str, Any]]) -> Iterable[Bars]:
    """A chart for all cases with the same implementations: FLOPs (if known) or units per second."""
    kinds: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for summary in summaries:
        each = summary["implementations"]
        flops = all("tflops" in figures for figures in each.values())
        unit = "TFLOP/s" if flops else f"{summary['unit']} a second"
        kinds.setdefault((unit, *each), {})[summary["case"]] = {
            name: figures["tflops" if flops else "per_second"] for name, figures in each.items()}
    for (unit, *_), groups in kinds.items():
        yield Bars(heading, groups, unit)


def _sweep(records: Sequence[TimeRecord]) -> Plot:
    """Throughput of the first implementation by batch size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record.parameters["batch"]):
        first = next(iter(record.summary["implementations"].values()))
        beams = record.parameters["beams"]
        lines.setdefault("greedy" if beams == 1 else f"{beams} beams", []).append(
            (record.parameters["batch"], first["per_second"]))
    return Plot("Throughput by batch and beams", lines, "batch", f"{records[0].summary['unit']} a second")


def _rows(summaries: Sequence[dict[str, Any]]) -> Iterable[list[str | float]]:
    for summary in summaries:
        # Of several ratios with the same name, the first counts.
        ratios = {ratio["fastest"][1]: ratio for ratio in reversed(summary["ratios"])}
        for name, each in summary["implementations"].items():
            seconds, ratio = each["seconds"], ratios.get(name)
            remark = "" if ratio is None else f"{ratio['of']} is {ratio['median']:.2f} × as fast"
            yield [summary["case"], name, *(seconds[key] for key in ("median", "lowest", "highest")),
                   each["per_second"], remark]
