"""A run that is killed repeatedly ends like one that never was: batches, dropout,
negatives, losses, weights."""

import os
import signal
import subprocess

import pytest
import torch
from patience import PATIENCE, until
from safetensors.torch import load_file
from training_runs import drawn_scenes, losses, train_command

STEPS, KILLS = 24, 5
VARIANTS = {"2 ranks, ZeRO 2": ["--runtime.ranks", "2", "--runtime.zero_stage", "2"],
            "2 ranks, ZeRO 1, saving in the background": ["--runtime.ranks", "2",
                                                          "--runtime.background_saves", "true"],
            "2 ranks, ZeRO 3": ["--runtime.ranks", "2", "--runtime.zero_stage", "3", "--runtime.accumulation",
                                "2"]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return drawn_scenes(tmp_path_factory.mktemp("scenes"), 40)


def start(folder, runs, *options) -> subprocess.Popen:
    """`blip-fast train` as the leader of a process group, so that its ranks can be killed with it."""
    command, environment = train_command(folder, runs, "--schedule.max_steps", str(STEPS),
                                         "--runtime.save_every", "2",
                                         "--tokenizer.vocab_size", "120", *options)
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def kill_all(run: subprocess.Popen) -> None:
    """SIGKILL to every process of the run: torchrun starts ranks in sessions of their own."""
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=False).stdout.split()
    ranks = [pid for child in children for pid in subprocess.run(
        ["pgrep", "-P", child], capture_output=True, text=True, check=False).stdout.split()]
    for pid in [str(run.pid), *children, *ranks]:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait()


def steps_done(runs) -> int:
    log = runs / "tiny" / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_sigterm_saves_and_the_run_goes_on(scenes, tmp_path, ranks):
    options = ["--runtime.ranks", ranks, "--runtime.save_every", "1000"]
    run = start(scenes, tmp_path, *options)
    until(lambda: steps_done(tmp_path) >= 3 or run.poll() is not None, pause=0.002)
    run.terminate()
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM: tiny is saved, go on with --resume" in said
    saved = (tmp_path / "tiny" / "checkpoints" / "latest").read_text()
    assert 3 <= int(saved.removeprefix("step-")) < STEPS and not (tmp_path / "tiny" / "model").exists()
    last = start(scenes, tmp_path, *options, "--resume")
    assert last.wait(timeout=PATIENCE) == 0, last.stdout.read()
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, STEPS + 1))


def run_to(step, folder, runs, *options) -> str:
    """Continue to `step` and save. The schedule's horizon does not change."""
    run = start(folder, runs, "--schedule.kind", "epoch_decay", "--schedule.max_steps", str(step), *options)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    return said


@pytest.mark.parametrize("stages", [
    ("1", "3", "2"), *(pytest.param((stage,) * 3, marks=pytest.mark.slow) for stage in "023")], ids="-".join)
def test_a_run_goes_on_with_other_ranks_and_stages(scenes, tmp_path, stages):
    """2 → 1 → 2 ranks: the same global batches, negatives and dropout masks, so the
    same losses up to rounding."""
    two = ["--runtime.ranks", "2"]
    run_to(12, scenes, tmp_path / "whole", *two, "--runtime.zero_stage", stages[0])
    one = ["--runtime.ranks", "1", "--runtime.accumulation", "2", "--runtime.streams", "2"]
    for step, ranks, stage in zip((4, 8, 12), (two, one, two), stages, strict=True):
        run_to(step, scenes, tmp_path / "moved", *ranks, "--runtime.zero_stage", stage,
               *["--resume"] * (step > 4))
    found, wanted = (torch.tensor(losses(tmp_path / name)) for name in ("moved", "whole"))
    assert found[:, 0].tolist() == list(range(1, 13))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_other_ranks_need_the_same_batches(scenes, tmp_path):
    run_to(1, scenes, tmp_path, "--runtime.ranks", "2")
    run = start(scenes, tmp_path, "--schedule.max_steps", "2", "--resume")
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode != 0
    assert "set runtime.streams to 2 and runtime.accumulation so that ranks × accumulation is 2" in said


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_five_times_ends_as_one_that_was_not(scenes, tmp_path, variant):
    whole = start(scenes, tmp_path / "whole", *VARIANTS[variant])
    assert whole.wait(timeout=PATIENCE) == 0, whole.stdout.read()
    runs = tmp_path / "killed"
    after = torch.randint(1, 5, (KILLS,), generator=torch.Generator().manual_seed(0)).tolist()
    for kill, steps in enumerate(after):
        run = start(scenes, runs, *VARIANTS[variant], *(["--resume"] if kill else []))
        reached = steps_done(runs) + steps if kill else steps + 2
        until(lambda run=run, reached=reached: steps_done(runs) >= reached or run.poll() is not None,
              pause=0.002)
        assert run.poll() is None, f"ended before it was killed: {run.stdout.read()}"
        kill_all(run)
    last = start(scenes, runs, *VARIANTS[variant], "--resume")
    assert last.wait(timeout=PATIENCE) == 0, last.stdout.read()
    assert [step for step, *_ in losses(runs)] == list(range(1, STEPS + 1))
    assert losses(runs) == losses(tmp_path / "whole")
    ours, theirs = (load_file(root / "tiny" / "model" / "model.safetensors")
                    for root in (runs, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
