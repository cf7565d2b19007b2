"""What a run tells while it goes: a progress bar, `log.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Writes one row per `log_every` steps on rank 0; the other ranks write nothing.

    Rows: `step`, `epoch`, `lr`, `temperature`, the losses by name and `loss` (means over the step's batches and ranks),
    `pairs_per_second`, `data_wait` (seconds a step that rank 0 waited for its batches), `skipped` batches so far,
    `memory_gb`; with negatives of all ranks `exchanged_mb`, visual tokens that one batch's negatives brought to rank 0,
    beside `gathering_mb`, what gathering everyone's would have.
    A resumed run goes on in the same file, behind the rows of the checkpoint that it resumes from.
    """

    def __init__(self, directory: Path, name: str, first_step: int, total_steps: int, writes: bool) -> None:
        self.path, self.writes = directory / "log.jsonl", writes
        if not writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self.path, first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            TextColumn("{task.fields[note]}"))
        self.task = self.bar.add_task(name, total=total_steps, completed=first_step, note="")
        self.bar.start()

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of steps done."""
        if not self.writes:
            return
        values = {**values, "memory_gb": _peak_memory_gb()}
        row = {"step": step, "time": round(time.time(), 3), **{key: round(value, 8) for key, value in values.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        losses = [key for key in ("itc", "itm", "lm", "answer", "reasoning") if key in values]
        note = "  ".join(f"{key} {values[key]:.3f}" for key in losses)
        self.bar.update(self.task, completed=step, note=f"{note}  {values['pairs_per_second']:.1f} pairs/s  "
                                                        f"{values['memory_gb']:.1f} GB")

    def close(self) -> None:
        if self.writes:
            self.bar.stop()
            self.board.close()
            self.file.close()


def read_log(path: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of every row of a `log.jsonl` that has `key`."""
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


def _drop_rows_after(path: Path, step: int) -> None:
    """Steps after the checkpoint are run again, so their rows go; also a row that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line
        if row["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept))


def _peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
