"""What a run reports while it trains: a live view (or plain lines), `log.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

# What the live view shows of a row, in this order: title, key, format. Keys that the row lacks are left out.
SHOWN = (("loss", "loss", ".3f"), ("ITC", "itc", ".3f"), ("ITM", "itm", ".3f"), ("LM", "lm", ".3f"),
         ("τ", "temperature", ".4f"), ("lr", "lr", ".2e"), ("pairs/s", "pairs_per_second", ",.1f"),
         ("tokens/s", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".1%"),
         ("data wait s", "data_wait", ".3f"),
         ("memory GB", "memory_gb", ".1f"), ("exchanged MB", "exchanged_mb", ".1f"),
         ("skipped", "skipped", ".0f"), ("quarantined", "quarantined", ".0f"))
COLUMNS = 4  # columns of the live view


class RunLog:
    """Writes one row per `log_every` steps on rank 0; the other ranks write nothing.

    A row has these fields:

    - `step`, `epoch`, `lr`, `temperature`; the losses by name and `loss` (means over
      the step's batches and ranks);
    - `pairs_per_second`, `tokens_per_second` (all ranks' visual and caption tokens, each counted once; no
      padding), `data_wait` (seconds per step that rank 0 waited for its batches);
    - so far: `skipped` batches, `skipped_updates`, and rank 0's `quarantined` images;
    - float16's `loss_scale`; `memory_gb` (rank 0's peak);
    - on a GPU with a known data sheet `mfu`: rank 0's FLOPs by formula (`step_costs.step_work`, without
      recomputed blocks) divided by the dense peak of the run's precision;
    - with negatives of all ranks `exchanged_mb`, the visual tokens that one batch's negatives brought to rank
      0, and `gathering_mb`, what gathering those of all ranks would have brought.

    A resumed run continues the same file, after the rows of the checkpoint that it resumes from.
    """

    def __init__(self, directory: Path, name: str, first_step: int, total_steps: int, writes: bool) -> None:
        self.path, self.writes = directory / "log.jsonl", writes
        if not writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self.path, first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        self.view = _View(name, first_step, total_steps)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of finished steps."""
        if not self.writes:
            return
        values = {**values, "memory_gb": _peak_memory_gb()}
        row = {"step": step, "time": round(time.time(), 3),
               **{key: round(value, 8) for key, value in values.items()}}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        self.view.show(step, values)

    def close(self) -> None:
        if self.writes:
            self.view.close()
            self.board.close()
            self.file.close()


class _View:
    """Progress and the newest row on stderr: in place on a terminal, elsewhere one line per row."""

    def __init__(self, name: str, first_step: int, total_steps: int) -> None:
        self.console, self.name, self.total = Console(stderr=True), name, total_steps
        self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                            console=self.console)
        self.task = self.bar.add_task(name, total=total_steps, completed=first_step)
        self.live = Live(self.bar, console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        if self.live is not None:
            self.live.start()

    def show(self, step: int, values: dict[str, float]) -> None:
        figures = [(title, format(values[key], form)) for title, key, form in SHOWN if key in values]
        if self.live is None:
            line = "  ".join(f"{title} {figure}" for title, figure in figures)
            self.console.print(f"{self.name} {step}/{self.total}  {line}", highlight=False, soft_wrap=True)
            return
        self.bar.update(self.task, completed=step)
        self.live.update(Group(self.bar, _grid(figures)))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def _grid(figures: list[tuple[str, str]]) -> Table:
    """Figures after their titles, `COLUMNS` per line."""
    grid = Table.grid(*["" for _ in range(COLUMNS)], padding=(0, 3))
    for start in range(0, len(figures), COLUMNS):
        line = figures[start : start + COLUMNS]
        grid.add_row(*[f"[dim]{title}[/dim] {figure}" for title, figure in line])
    return grid


def read_log(path: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of every row of a `log.jsonl` that has `key`."""
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


def _drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps after the checkpoint, which run again, and a row that was cut short."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line
        if row["step"] <= step:
            rows.append(line + "\n")
    path.write_text("".join(rows))


def _peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not above: Windows has no such module; it does not train, but imports this file

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
