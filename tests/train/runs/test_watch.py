"""Watching a run as a user does: its log rows, the live view, a profile, and
the estimate before it starts."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blip_train.logs.meter import Meter
from blip_train.logs.run_log import RunLog, read_log
from blip_train.recipe import load_recipe
from patience import PATIENCE
from training_runs import blip_fast_train

from blip_fast.cli import main

BASE = "train/blip_train/recipes/pretrain_base.yaml"


def test_a_profiled_run(scenes, tmp_path):
    """Rows with speed and skipped batches, no MFU on a CPU, plain lines, a Chrome trace and its operators."""
    done = blip_fast_train(scenes, tmp_path, "--schedule.max_steps", "5", "--profile", "2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert (row["quarantined"], row["skipped"]) == (0, 0) and "mfu" not in row
        tokens = row["tokens_per_second"] / row["pairs_per_second"]
        assert 5 + 4 <= tokens <= 5 + 30  # five visual tokens a picture, and a caption
    lines = [line for line in done.stderr.splitlines() if line.startswith("tiny ")]
    assert len(lines) == 5 and lines[-1].startswith("tiny 5/5  loss ") and "\x1b" not in done.stderr
    (trace,) = (run / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert {f"ProfilerStep#{step}" for step in (2, 3)} <= {event.get("name") for event in events}
    assert {"blip_kernels::contrastive", "aten::addmm"} <= {event.get("name") for event in events}
    assert "2 steps, own time on the CPU" in done.stderr and "ms a step" in done.stderr


def test_two_ranks_profile_the_first(scenes, tmp_path):
    done = blip_fast_train(scenes, tmp_path, "--runtime.ranks", "2", "--schedule.max_steps", "2", "--profile",
                           "1", "--runtime.batch_size", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the run ended within its first 2 steps") == 1
    assert not list((tmp_path / "tiny" / "profile").glob("*"))


def test_mfu_is_flops_over_time_and_the_data_sheet(monkeypatch):
    """Two steps of two batches in 8 s on an A100. A run's first steps compute only LM, which costs less."""
    clock = iter([100.0, 108.0, 108.0, 116.0, 116.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    recipe = load_recipe(BASE, ["--runtime.accumulation=2", "--runtime.precision=bfloat16"])
    batches = SimpleNamespace(waited=0.0, tokens=0)
    meter = Meter(recipe, recipe.model, [batches], torch.device("cuda"))
    rows = []
    for language_only in (False, True):
        for _ in range(2):
            batches.tokens += 2 * 80 * 14
            batches.waited += 0.5
            meter.step(language_only)
        rows.append(meter.row())
    assert rows[0]["mfu"] == pytest.approx(4 * 80 * 199.7e9 / 8 / 312e12, rel=1e-3)
    assert rows[1]["mfu"] < rows[0]["mfu"] * 0.75
    for row in rows:
        assert (row["pairs_per_second"], row["tokens_per_second"], row["data_wait"]) == (40, 40 * (197 + 14),
                                                                                         0.5)


def test_the_live_view_is_compact_on_a_terminal(tmp_path, monkeypatch):
    """A bar and four lines of figures, drawn over themselves."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        log = RunLog(tmp_path, "tiny", 0, 2, writes=True)
        for step in (1, 2):
            log.row(step, {"loss": 6.0, "itc": 3.25, "itm": 0.5, "lm": 2.25, "temperature": 0.07, "lr": 3e-4,
                           "pairs_per_second": 1234.5, "tokens_per_second": 260000.0, "mfu": 0.4567,
                           "data_wait": 0.0,
                           "skipped": 0, "quarantined": 3, "exchanged_mb": 12.0, "gathering_mb": 99.0})
        log.close()
        terminal.flush()
        shown = b""
        while select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 1 << 16)
    os.close(master)
    shown = shown.decode()
    last = shown[shown.rindex("tiny"):]
    assert "2/2" in last and last.count("\n") <= 5
    for figure in ("3.250", "3.00e-04", "1,234.5", "45.7%", "quarantined"):
        assert figure in last
    assert "99" not in last  # what gathering would have moved is in the log alone
    assert read_log(tmp_path / "log.jsonl", "mfu") == [(1, 0.4567), (2, 0.4567)]


def test_dry_run_as_json():
    command = [sys.executable, "-m", "blip_fast", "train", "--config", BASE, "--dry-run", "--gpus", "8,512",
               "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["gpus"], row["zero_stage"]) for row in rows] == [(n, stage) for n in (8, 512)
                                                                  for stage in range(4)]
    for row in rows:
        assert row["parameters"] == 252_441_919 and row["global_batch"] == 80 * row["gpus"]
        assert row["memory_total"] == pytest.approx(sum(row["memory"].values()))
        assert row["pair_flops"] == pytest.approx(199.7e9, rel=1e-3)
        speeds = row["pairs_per_second_per_gpu"]
        assert speeds["A100"]["expected"] < speeds["H100"]["expected"] < speeds["B200"]["expected"]
        assert row["published_pairs_per_second_per_gpu"] == 29 and len(row["assumptions"]) == 5


def test_dry_run_as_a_table_says_what_it_assumes(capsys):
    assert main(["train", "--config", BASE, "--dry-run", "--runtime.zero_stage", "2"]) == 0
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "252,441,919 trained parameters" in said and "nothing of the speed is measured" in said
    assert max(map(len, out.splitlines())) <= 80
    assert not Path("runs/pretrain_base").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--dry-run", "--gpus", "0"], "--gpus is 0: it must be at least 1"),
    (["--dry-run", "--gpus", "8,many"], "--gpus is '8,many': name whole numbers"),
    (["--dry-run", "--caption-tokens", "99"],
     "--caption-tokens is 99: it must be 3 to tokenizer.max_tokens, 30"),
    (["--gpus", "8"], "belong to --dry-run"),
    (["--profile", "-1"], "--profile is -1: name how many steps"),
    (["--profile", "some"], "some"),
])
def test_a_bad_value_is_one_clear_line(tmp_path, capsys, options, message):
    assert main(["train", "--config", BASE, "--runs", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
