"""`blip-fast train --profile`: a trace of a few steps for TensorBoard or chrome://tracing, and a table of the
operators that took most time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

WARM_UP = 2  # first steps, which are not traced: allocations, autotuning, ZeRO 3's tracing of the modules
OPERATORS = 12  # rows of the printed table


class StepProfiler:
    """Traces `steps` optimiser steps of rank 0 after the first `WARM_UP`; with 0 none.
    Call `step` after each step."""

    def __init__(self, steps: int, directory: Path) -> None:
        self.steps, self.directory, self._done, self._profile = steps, directory, 0, None
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, on_trace_ready=self._finish,
                                    schedule=schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1))
            self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._done += 1
            self._profile.step()

    def close(self) -> None:
        """Also writes a trace that the run's end cut short."""
        if self._profile is not None:
            self._profile.stop()
            if self._done <= WARM_UP:
                Console(stderr=True).print(f"--profile: the run ended within its first {WARM_UP} steps, "
                                           "which are not traced")

    def _finish(self, traced: Any) -> None:
        steps = min(self._done - WARM_UP, self.steps)
        if steps <= 0:
            return
        tensorboard_trace_handler(str(self.directory), worker_name="rank-0")(traced)
        console = Console(stderr=True)
        console.print(_table(traced.key_averages(), steps))
        console.print(f"trace: {self.directory} (TensorBoard, chrome://tracing or ui.perfetto.dev)")


def _table(averages: Any, steps: int) -> Table:
    """Operators by their own time: on the GPU if there is one, else on the CPU."""
    on_gpu = torch.cuda.is_available()

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(averages, key=own, reverse=True)
    total = sum(map(own, events)) or 1.0
    table = Table("operator", "calls", "ms a step", "share", box=SIMPLE_HEAD,
                  title=f"{steps} steps, own time on the {'GPU' if on_gpu else 'CPU'}")
    for column in table.columns[1:]:
        column.justify = "right"
    for event in events[:OPERATORS]:
        table.add_row(event.key[:60], f"{event.count:,}", f"{own(event) / steps / 1000:.2f}",
                      f"{own(event) / total:.1%}")
    return table
