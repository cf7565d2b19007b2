"""`blip-fast caption` on many images: killed and resumed, interrupted, shared, on Ray, in flat memory."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import odd_files
import pytest
from hf_models import save_model, small_tokenizer
from patience import PATIENCE

from blip_fast.cli import main
from blip_fast.command_line.jsonl import JsonLines
from blip_fast.data.shards.shards import Sample, write_shards

GENERATION = ("--beams", "1", "--max-length", "10")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("captioning")
    save_model("BlipForConditionalGeneration", small_tokenizer(), directory, sep_bias=4.0, seed=2)
    return directory


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [odd_files.encoded(odd_files.picture(60, 40, seed=i), "JPEG") for i in range(20)]


def fill(folder: Path, count: int, files: list[bytes]) -> Path:
    """Make pictures in two folders, every 17th broken."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if i % 17 == 16 else files[i % len(files)])
    return folder


def command(model: Path, *arguments: object) -> list[str]:
    return ["caption", "--model", str(model), "--dtype", "float32", *GENERATION, *map(str, arguments)]


def start(model: Path, *arguments: object) -> subprocess.Popen:
    """Start a run with default SIGINT handling, which background jobs of a shell lack."""
    return subprocess.Popen([sys.executable, "-m", "blip_fast", *command(model, *arguments)],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def peak_memory(model: Path, folder: Path, output: Path) -> int:
    """Peak memory of the run, in KB."""
    process = start(model, folder, "--output", output)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1  # some images are broken
    return usage.ru_maxrss


@pytest.mark.slow
def test_killed_five_times_and_resumed(model, files, tmp_path):
    """2,000 images: the file of an undisturbed run, byte for byte, in the memory of a run of 200 images."""
    few, many = fill(tmp_path / "few", 200, files), fill(tmp_path / "many", 2000, files)
    small = peak_memory(model, few, tmp_path / "few.jsonl")
    large = peak_memory(model, many, tmp_path / "whole.jsonl")
    print(f"\npeak {small / 1024:.0f} MB for 200 images, {large / 1024:.0f} MB for 2,000")
    assert large < 1.05 * small

    output, random = tmp_path / "killed.jsonl", np.random.default_rng(0)
    for kill in range(1, 6):
        process = start(model, many, "--output", output, "--resume")
        wait_for_lines(output, 330 * kill + int(random.integers(-150, 150)), process)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    process = start(model, many, "--output", output, "--resume")
    process.communicate()
    assert process.returncode in (0, 1)
    assert len(rows(output)) == 2000 == len({row["image"] for row in rows(output)})
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_whole_file(model, files, tmp_path, number, status):
    folder, output = fill(tmp_path / "pictures", 40, files), tmp_path / "captions.jsonl"
    listed = tmp_path / "list"
    names = "".join(f"{path}\n" for path in sorted(folder.rglob("*.jpg")) if path.read_bytes() != b"broken")
    listed.write_text(names * 200)
    process = start(model, "--list", listed, "--output", output)
    wait_for_lines(output, 20, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    assert "captions.jsonl is whole" in said and "--resume" in said and "Traceback" not in said
    content = output.read_bytes()
    assert content.endswith(b"\n") and 20 <= len(rows(output)) < 200 * names.count("\n")


def test_shares_are_a_partition(model, files, tmp_path):
    """Nothing twice, nothing missing, sizes that differ by at most one; also for a tar and a list."""
    folder = fill(tmp_path / "pictures", 11, files)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for i in range(6):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(files[i])
            tar.addfile(member, io.BytesIO(files[i]))
    arguments = (folder, tmp_path / "some.tar")
    assert main(command(model, *arguments, "--output", tmp_path / "all.jsonl")) == 0
    shares = []
    for i in range(3):
        assert main(command(model, *arguments, "--output", tmp_path / f"{i}.jsonl", "--shard", f"{i}/3")) == 0
        shares.append(rows(tmp_path / f"{i}.jsonl"))
    dealt = [row for row in itertools.chain(*itertools.zip_longest(*shares)) if row is not None]
    assert dealt == rows(tmp_path / "all.jsonl") and sorted(map(len, shares)) == [5, 6, 6]


@pytest.mark.parametrize("share", ["3/3", "-1/3", "1", "a/b", "0/0"])
def test_a_share_that_is_none_is_refused(model, share, capsys):
    assert main(command(model, "photo.jpg", f"--shard={share}")) == 2
    assert "share" in capsys.readouterr().err


def test_lists_with_prompts(model, files, tmp_path, capsys, monkeypatch):
    """One path per line, from a file or standard input; a prompt after a tab. One image with two prompts
    makes two rows, and a resumed run knows which of them is done."""
    folder = fill(tmp_path, 2, files)
    image, other = sorted(map(str, folder.rglob("*.jpg")))
    lines = [f"{image}\ta man\n", "\n", f"{image}\ttwo dogs\n", f"{other}\n", "nowhere.jpg\n",
             "s3://bucket/1.jpg\n"]
    (tmp_path / "list").write_text("".join(lines))
    output = tmp_path / "captions.jsonl"
    assert main(command(model, "--list", tmp_path / "list", "--output", output)) == 1
    written = rows(output)
    assert [(row["image"], row.get("prompt")) for row in written] == [
        (image, "a man"), (image, "two dogs"), (other, None), ("nowhere.jpg", None),
        ("s3://bucket/1.jpg", None)]
    assert [row["caption"].startswith(start) for row, start in
            zip(written, ("a man", "two dogs", "a picture of"), strict=False)] == [True] * 3
    said = capsys.readouterr().err
    assert "2 of 5 images have no result" in said and "1 × no such file" in said
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    assert main(command(model, "--list", tmp_path / "list", "--output", output, "--resume")) == 0
    assert rows(output) == [*written[1:], written[0]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(lines).encode())))
    assert main(command(model, "--list", "-", "--json")) == 1
    printed = [{**json.loads(line), "dtype": "float32"} for line in capsys.readouterr().out.splitlines()]
    assert printed == written  # `dtype` is only written to files


def test_patterns_and_odd_names(model, files, tmp_path, capsys):
    """A quoted pattern matches only images and tars; a name that is not UTF-8 comes back unchanged."""
    odd = os.fsdecode(b"caf\xe9.jpg")
    for name in ("2.jpg", "10.jpg", odd):
        (tmp_path / name).write_bytes(files[0])
    (tmp_path / "notes.txt").write_text("no picture")
    output = tmp_path / "out" / "captions.jsonl"
    for _ in range(2):
        assert main(command(model, f"{tmp_path}/*", "--output", output, "--resume")) == 0
    assert [row["image"] for row in rows(output)] == [f"{tmp_path}/{name}"
                                                      for name in ("10.jpg", "2.jpg", odd)]
    capsys.readouterr()
    assert main(command(model, tmp_path / odd)) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/caf\\udce9.jpg\t")
    assert main(command(model, f"{tmp_path}/*.gif")) == 2
    assert "holds no images" in capsys.readouterr().err


def test_a_tar_cut_short_gives_what_is_whole(model, files, tmp_path, capsys):
    """The images before the cut, and a row with the tar's error."""
    path, output = tmp_path / "cut.tar", tmp_path / "captions.jsonl"
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(files[i])
            tar.addfile(member, io.BytesIO(files[i]))
    content = bytearray(path.read_bytes())
    third = content.index(b"2.jpg")
    content[third : third + 512] = b"x" * 512
    path.write_bytes(content)
    assert main(command(model, path, "--output", output)) == 1
    assert [row["image"] for row in rows(output)] == [f"{path}/0.jpg", f"{path}/1.jpg", str(path)]
    assert "no whole uncompressed tar" in rows(output)[2]["error"]


def test_urls_of_shards(model, files, tmp_path, capsys):
    """Tars under a URL are fetched through the cache; a tar whose rows all exist is not fetched again."""
    write_shards([Sample(f"{i}", files[i], {}) for i in range(5)], tmp_path / "shards", samples_per_shard=2)
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in (tmp_path / "shards").iterdir():
        system.pipe_file(f"/captions/{path.name}", path.read_bytes())
    arguments = ("memory://captions", "--cache", tmp_path / "cache")
    output = tmp_path / "captions.jsonl"
    assert main(command(model, *arguments, "--output", output)) == 0
    assert main(command(model, tmp_path / "shards", "--output", tmp_path / "local.jsonl")) == 0
    texts = [[row["token_ids"] for row in rows(path)] for path in (output, tmp_path / "local.jsonl")]
    assert texts[0] == texts[1] and len(texts[0]) == 5
    assert [row["image"] for row in rows(output)][:3] == [
        "memory://captions/000000.tar/0.jpg", "memory://captions/000000.tar/1.jpg",
        "memory://captions/000001.tar/2.jpg"]
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:2]))
    for tar in (tmp_path / "cache").glob("*.tar"):
        tar.unlink()
    system.rm_file("/captions/000000.tar")  # it is done, so it is not requested
    assert main(command(model, *arguments, "--output", output, "--resume")) == 0
    assert [row["token_ids"] for row in rows(output)] == texts[0]
    system.rm_file("/captions/000002.tar")
    for tar in (tmp_path / "cache").glob("*.tar"):
        tar.unlink()
    assert main(command(model, "memory://captions/000002.tar", "--cache", tmp_path / "cache", "--json")) == 2
    assert "000002.tar is missing" in capsys.readouterr().err


def test_two_runs_do_not_write_one_file(tmp_path):
    first = JsonLines(tmp_path / "captions.jsonl", resume=True)
    with pytest.raises(ValueError, match="being written by another process"):
        JsonLines(tmp_path / "captions.jsonl", resume=True)
    first.close()
    JsonLines(tmp_path / "captions.jsonl", resume=True).close()


def test_ray_gives_the_same_rows(model, files, tmp_path):
    pytest.importorskip("ray.data", reason="--ray needs the extra `scale`")
    folder = fill(tmp_path / "pictures", 40, files)
    outputs = [tmp_path / "here.jsonl", tmp_path / "ray.jsonl"]
    assert main(command(model, folder, "--output", outputs[0], "--batch-size", 2)) == 1
    assert main(command(model, folder, "--output", outputs[1], "--batch-size", 2, "--ray=local")) == 1
    assert rows(outputs[0]) == rows(outputs[1])


def test_a_cluster_that_does_not_answer_is_one_clear_line(model, files, tmp_path, capsys):
    pytest.importorskip("ray.data", reason="--ray needs the extra `scale`")
    assert main(command(model, fill(tmp_path / "pictures", 2, files), "--ray=127.0.0.1:1")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no Ray cluster answers at 127.0.0.1:1" in said


def test_without_ray_there_is_one_clear_line(model, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = fill(tmp_path / "pictures", 2, files)
    assert main(command(model, folder, "--ray")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ray" in said
