"""`blip-fast capfilt` killed and resumed, interrupted, split into shares, on Ray: the final files are always
the same."""

import signal
import subprocess
import sys

import pytest
from capfilt_runs import arguments, contents, save_models

from blip_fast.capfilt.shard import clean_shard
from blip_fast.cli import main
from blip_fast.data.shards.shards import INDEX

# Counts changes to the folder (members written to tars, renames) and dies just before one of them.
DYING = """
import os, signal, sys
from pathlib import Path
from webdataset.writer import TarWriter

left = int(sys.argv[1])

def die_before(method):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    return call

Path.replace, TarWriter.write = die_before(Path.replace), die_before(TarWriter.write)
from blip_fast.capfilt.shard import clean_shard
from blip_fast.cli import main
main(sys.argv[2:])
"""


def test_killed_five_times_and_resumed(cleaners, web_shards, cleaned, tmp_path):
    """SIGKILL within the first tar; within the second, after the first's mark; just before the renames of the
    second's tar, texts and mark. The files are those of an undisturbed run."""
    output = tmp_path / "killed"
    command = arguments(cleaners, web_shards, "--output", output, "--resume")
    marks = []
    for moment in (4, 13, 6, 10, 11):
        process = subprocess.run([sys.executable, "-c", DYING, str(moment), *command], capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        marks.append(len(list((output / "done").glob("*.json"))))
        assert not (output / INDEX).exists()
    assert marks == sorted(marks) and marks[:2] == [0, 1]
    assert any(path.suffix == ".part" for path in output.rglob("*"))
    assert main(command) == 0
    assert contents(output) == contents(cleaned)


def test_an_interrupted_run_says_how_to_go_on(cleaners, web_shards, cleaned, tmp_path, monkeypatch, capsys):
    def interrupted(tar, number, *more):
        if number == 1:
            raise KeyboardInterrupt
        return clean_shard(tar, number, *more)

    monkeypatch.setattr("blip_fast.capfilt.shard.clean_shard", interrupted)
    assert main(arguments(cleaners, web_shards, "--output", tmp_path / "clean")) == 130
    assert "interrupted after 1 shards; the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments(cleaners, web_shards, "--output", tmp_path / "clean", "--resume")) == 0
    assert contents(tmp_path / "clean") == contents(cleaned)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_every_half_written_shard_is_done_again(cleaners, web_shards, cleaned, tmp_path, finished):
    """What a kill can leave, made by hand: some files of a shard exist, but not its mark."""
    output = tmp_path / "half"
    assert main(arguments(cleaners, web_shards, "--output", output)) == 0
    (output / INDEX).unlink()
    (output / "done" / f"{finished:06d}.json").unlink()
    (output / "texts" / f"{finished:06d}.parquet").write_bytes(b"PAR1")
    (output / f"{finished:06d}.tar.77.part").write_bytes(b"cut short")
    assert main(arguments(cleaners, web_shards, "--output", output, "--resume")) == 0
    assert contents(output) == contents(cleaned)


def test_finished_shards_are_left_alone(cleaners, web_shards, cleaned, tmp_path, capsys):
    output = tmp_path / "twice"
    assert main(arguments(cleaners, web_shards, "--output", output)) == 0
    tars = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    assert main(arguments(cleaners, web_shards, "--output", output)) == 2
    assert "holds finished shards: go on with them (--resume)" in capsys.readouterr().err
    assert main(arguments(cleaners, web_shards, "--output", output, "--resume")) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")} == tars
    assert contents(output) == contents(cleaned)
    assert main(arguments(cleaners, web_shards, "--output", output, "--resume", "--threshold", 0.6)) == 2
    assert "other options (threshold was 0.5, is 0.6)" in capsys.readouterr().err


def test_other_weights_are_refused(web_shards, tmp_path, capsys):
    output, own = tmp_path / "clean", tmp_path / "models"
    assert main(arguments(save_models(own), web_shards, "--output", output, "--shard", "0/3")) == 0
    save_models(own, filter_seed=4)
    assert main(arguments(own, web_shards, "--output", output, "--resume")) == 2
    assert "other weights" in capsys.readouterr().err


def test_shares_together_are_the_whole(cleaners, web_shards, cleaned, tmp_path, capsys):
    output = tmp_path / "shared"
    for i in (1, 0):
        assert not (output / INDEX).exists()
        assert main(arguments(cleaners, web_shards, "--output", output, "--shard", f"{i}/2")) == 0
        if i:
            assert "1 of 3 shards are done" in capsys.readouterr().err
            assert [path.name for path in sorted((output / "done").iterdir())] == ["000001.json"]
    assert contents(output) == contents(cleaned)


def test_ray_gives_the_same_folder(cleaners, web_shards, cleaned, tmp_path):
    pytest.importorskip("ray.data", reason="--ray needs the extra `scale`")
    output = tmp_path / "ray"
    assert main(arguments(cleaners, web_shards, "--output", output, "--ray=local")) == 0
    assert contents(output) == contents(cleaned)


def test_without_ray_there_is_one_clear_line(cleaners, web_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(cleaners, web_shards, "--output", tmp_path / "ray", "--ray")) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "ray" in errors
