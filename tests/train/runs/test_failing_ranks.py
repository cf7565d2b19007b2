"""A run of two ranks, one of which fails, dies or hangs, ends within a minute, and its last line
says which rank it was and why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blip_train.engine.watchdog import Place, describe
from blip_train.launch import _cause
from patience import PATIENCE
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from training_runs import drawn_scenes, losses, train_command

# Python runs sitecustomize when it starts, so the fault needs no hook in the product.
PLANTED = """
import os, signal
if os.environ.get("RANK") == "1":
    from blip_train.steps import pretraining

    forward, calls = pretraining.Pretraining.forward, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == {call}:
            {fault}
        return forward(self, *args)

    pretraining.Pretraining.forward = failing
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return drawn_scenes(tmp_path_factory.mktemp("scenes"))


def failing_run(scenes, folder: Path, fault: str, *options: str,
                call: int = 4) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A run of two ranks whose rank 1 carries out `fault` in its fourth step or
    `call`th forward, and its log."""
    (folder / "sitecustomize.py").write_text(PLANTED.format(fault=fault, call=call))
    command, environment = train_command(scenes, folder, "--runtime.ranks", "2", *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env=environment | {"PYTHONPATH": str(folder)})
    rows = [json.loads(line) for line in (folder / "tiny" / "log.jsonl").read_text().splitlines()]
    return done, rows


@pytest.mark.parametrize(("fault", "own", "cause"), [
    ("raise KeyError('planted')", "KeyError: 'planted'", "rank 1 failed with KeyError: 'planted'"),
    ("raise ValueError('planted: mend it')", "blip-fast: planted: mend it",
     "rank 1 failed with ValueError: planted: "),
    ("os.kill(os.getpid(), signal.SIGKILL)", "",
     "rank 1 was killed by SIGKILL, as the kernel does when memory runs"),
])
def test_a_rank_that_dies_ends_the_run_with_its_error(scenes, tmp_path, fault, own, cause):
    done, rows = failing_run(scenes, tmp_path, fault)
    assert done.returncode == 2 and [row["step"] for row in rows] == [1, 2, 3]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"blip-fast: the run tiny ended: {cause}") and last.endswith("; go on with "
                                                                                        "--resume")
    assert own in done.stderr
    assert "did not arrive" not in done.stderr  # nobody waited for it until runtime.timeout
    assert "ChildFailedError" not in done.stderr and "[rank0]: Traceback" not in done.stderr


@pytest.mark.parametrize(("ends", "named"), [
    # Rank 1 failed first, and was killed while it ended.
    ({0: (2, "ConnectionError: rank 0 lost its connection"), 1: (-15, "ValueError: mine")}, 1),
    ({0: (-15, None), 1: (2, "ValueError: mine")}, 1), ({0: (-15, None), 1: (-9, None)}, 1),
    ({0: (2, "ValueError: mine"), 1: (2, "KeyError: later")}, 0),
    ({1: (2, "ConnectionError: rank 1"), 0: (-15, None)}, 1),
])
def test_the_rank_that_is_named(tmp_path, ends, named):
    """`ends`: exit status and recorded error by rank, in the order in which the launcher saw them end."""
    failures = {}
    for rank, (status, recorded) in ends.items():
        file = tmp_path / f"{rank}.json"
        if recorded is not None:
            file.write_text(json.dumps({"message": {"message": recorded, "extraInfo": {"timestamp": "0"}}}))
        failures[rank] = ProcessFailure(rank, 1, status, str(file))
    assert _cause(ChildFailedError("run", failures)).startswith(f"rank {named} ")


@pytest.mark.slow  # for half a minute the launcher waits for the frozen rank to end by itself
def test_a_frozen_rank_is_named_with_the_step_and_the_phase(scenes, tmp_path):
    """SIGSTOP: nothing closes its connections."""
    fault = "os.kill(os.getpid(), signal.SIGSTOP)"
    done, rows = failing_run(scenes, tmp_path, fault, "--runtime.timeout", "20")
    assert done.returncode == 2 and [row["step"] for row in rows] == [1, 2, 3]
    assert "blip-fast: step 4, agreement on the batch: rank 1 did not arrive within 20 s" in done.stderr
    assert "in accepts\n" in done.stderr  # the stack says where rank 0 waits
    assert "the run tiny ended: rank 0 failed with TimeoutError: step 4, agreement on" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("body", "status"), [("time.sleep(600)", 1), (
    "[dog.enter('forward') or time.sleep(0.4) for _ in range(20)]", 0)])
def test_only_a_rank_that_stands_still_is_ended(body, status):
    program = ("import time; from blip_train.engine.watchdog import Watchdog; dog = Watchdog(5); dog.step = "
               f"3\nwith dog.watching():\n    dog.enter('input'); {body}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE,
                          check=False)
    assert done.returncode == status, done.stderr
    assert ("step 3, input: rank 0 did not get through within 5 s" in done.stderr) == bool(status)


def test_who_did_not_arrive():
    here = Place(12, "backward", 70, heard=100.0)
    others = {0: here, 1: Place(12, "forward", 68, heard=79.0), 2: Place(12, "backward", 70, heard=99.0),
              3: Place(12, "backward", 70, heard=80.0)}
    assert describe(0, here, 20, others, now=100.0) == (
        "step 12, backward: rank 1 did not arrive within 20 s (last heard of 21 s ago in step 12, forward); "
        "rank 3 did not arrive within 20 s (last heard of 20 s ago in step 12, backward)")
    assert describe(1, Place(3, "input", 9), 5, {0: Place(3, "forward", 10, 1.0)}, now=1.0) == (
        "step 3, input: rank 1 did not get through within 5 s, and no other rank is behind it")


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_leaves_the_checkpoint_before(scenes, tmp_path, background):
    """A limit on what one file may hold stands for it: the writes of rank 1's part fail in the same way."""
    fault = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))"
    done, rows = failing_run(scenes, tmp_path, fault, "--runtime.zero_stage", "2",
                                "--runtime.background_saves", background, call=6)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert done.returncode == 2 and len(rows) == 8
    said = (rf"checkpoint step-00000008 could not be written to {checkpoints}: .* \([\d,.]+ MB are free "
             "there; "
            r"step-00000004 takes [\d,.]+ MB and is whole\): make room, or lower runtime.keep_checkpoints")
    assert re.search(rf"^blip-fast: {said}$", done.stderr, re.MULTILINE)
    assert re.search(rf"^blip-fast: the run tiny ended: rank 1 failed with OSError: {said}; go on with "
                      "--resume$",
                     done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert (checkpoints / "latest").read_text() == "step-00000004"
    (checkpoints / "step-00000007").mkdir()  # as a run leaves it that saved more often
    command, environment = train_command(scenes, tmp_path, "--runtime.ranks", "2", "--runtime.zero_stage",
                                         "2", "--resume")
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False,
                             env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000004", "step-00000008"}


def test_a_rank_killed_while_it_writes_in_the_background_leaves_the_checkpoint_before(scenes, tmp_path):
    """Its first file is there, but not on the disk; resumed, the run ends as one that was not killed."""
    fault = ("from blip_train.checkpoint import writer; "
             "writer._to_disk = lambda file: os.kill(os.getpid(), signal.SIGKILL)")
    options = ("--runtime.zero_stage", "2", "--runtime.background_saves", "true", "--runtime.save_every", "2")
    done, _ = failing_run(scenes, tmp_path, fault, *options, call=6)
    assert "rank 1 was killed by SIGKILL" in done.stderr.splitlines()[-1]
    # Step 4's may not have been written when the fault was planted; step 2's was, for step 4's waited for it.
    assert (tmp_path / "tiny" / "checkpoints" / "latest").read_text() in ("step-00000002", "step-00000004")
    (tmp_path / "sitecustomize.py").unlink()
    for runs, more in ((tmp_path, ["--resume", *options]), (tmp_path / "whole", options[:2])):
        command, environment = train_command(scenes, runs, "--runtime.ranks", "2", *more)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False,
                               env=environment)
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path) == losses(tmp_path / "whole")
    ours, theirs = (load_file(runs / "tiny" / "model" / "model.safetensors")
                    for runs in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
