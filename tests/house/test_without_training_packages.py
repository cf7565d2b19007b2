"""An installation without Triton, DALI and DeepSpeed, as on macOS, Windows and many aarch64 machines: all
inference works, and training says in one sentence what is missing.

The packages, and the functions that Python lacks on Windows, are blocked in a separate process. This tests
imports and calls only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blip_kernels.cpu import processor

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("httpx", reason="the tests of serving need the extra `dev`")

from serving import photos, write_model

from blip_fast.cli import main
from blip_fast.data.shards.shards import OpenShard, Sample, write_shards

BLOCKED = ["triton", "nvidia", "deepspeed", "torchao", "peft", "tensorboard", "ray", "faiss",
           "usearch", "pyarrow", "fcntl", "resource"]
BLOCK = f"""
import os, signal, sys
from importlib.machinery import PathFinder

class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Lacking
del os.pread, os.fork, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL
"""
CHILD = BLOCK + """
import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from blip_fast.cli import main

done = []
for arguments in json.loads(sys.stdin.read()):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(arguments)
    done.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


def without_packages(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each command, all run in one process without the packages."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], input=json.dumps(commands),
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A captioner with matching heads, an answerer, pictures with captions, and shards of them."""
    root = tmp_path_factory.mktemp("place")
    write_model(root / "model", "tied")
    write_model(root / "answerer", "untied")
    (root / "pictures").mkdir()
    rows, samples = [], []
    for i, content in enumerate(photos(4)):
        (root / "pictures" / f"{i}.jpg").write_bytes(content)
        rows.append({"image": f"{i}.jpg", "captions": ["a dog on grass", f"{i + 2} people"]})
        samples.append(Sample(f"{i}", content, {"captions": rows[-1]["captions"]}))
    (root / "pictures" / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(samples, root / "shards", samples_per_shard=4)
    (root / "labels.txt").write_text("dog\nhorse\n")
    return root


def test_inference_gives_the_same(place, capsys):
    """Every command that runs a model succeeds, and prints the same as with all packages."""
    model, answerer = f"--model={place / 'model'}", f"--model={place / 'answerer'}"
    pictures = str(place / "pictures")
    picture, tar = str(place / "pictures" / "0.jpg"), str(next((place / "shards").glob("*.tar")))
    alike = [
        ["caption", model, "--json", "--dtype", "float32", "--beams", "2", pictures, tar],
        ["score", model, "--json", "--dtype", "float32", picture, "a dog", "two people"],
        ["ask", answerer, "--json", "--dtype", "float32", picture, "what is it?"],
        ["classify", model, "--json", "--dtype", "float32", "--labels", str(place / "labels.txt"), pictures],
        ["evaluate", "caption", model, "--json", "--dtype", "float32", "--data", pictures],
        ["evaluate", "retrieval", model, "--json", "--dtype", "float32", "--data", str(place / "shards")],
    ]
    others = [
        ["caption", model, "--dtype", "bfloat16", picture],
        ["explain", model, picture, "a dog", "--word", "dog", "--output", str(place / "seen.png")],
        ["search", "index", model, "--index", str(place / "index"), pictures, tar],
        ["search", "query", "--index", str(place / "index"), "--text", "a dog"],
        ["convert", "--to", "hf", "--task", "caption", str(place / "model"), str(place / "converted")],
        ["--help"],
    ]
    found = without_packages([*alike, *others])
    for command, (status, _, error) in zip([*alike, *others], found, strict=True):
        assert status == 0, (command, error)
    for command, (_, output, _) in zip(alike, found, strict=False):
        assert main(command) == 0
        assert _rows(output) == _rows(capsys.readouterr().out), command


def _rows(output: str) -> list[dict]:
    """The rows that a command printed, without durations."""
    rows = [json.loads(line) for line in output.splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def test_what_is_lacking_is_one_sentence(place):
    training = ("DeepSpeed and DALI", "[train,dali-cuda12]")
    recipes = "train/blip_train/recipes"
    named = {
        ("train", "--config", f"{recipes}/scenes.yaml"): training,
        ("bootstrap", "--config", f"{recipes}/bootstrap_scenes.yaml"): training,
        ("demo",): training,
        ("tasks",): training,
        ("data", "pack", "tests", "--output", "packed"): ("nvidia", "[dali-cuda12]"),
        ("kernels",): ("triton",),
    }
    if not processor.has_int8():  # otherwise nothing is missing
        command = "caption", f"--model={place / 'model'}", "--dtype=int8", str(place / "pictures")
        named[command] = ("torchao", "[int8]")
    found = without_packages([list(command) for command in named])
    for (command, names), (status, output, error) in zip(named.items(), found, strict=True):
        assert status == 2 and not output and error.count("\n") == 1, (command, error)
        assert all(name in error for name in names), error


def test_a_shard_is_read_alike_without_pread(place, monkeypatch):
    """Windows has no `os.pread`."""
    path = next((place / "shards").glob("*.tar"))
    shard = OpenShard(path, "shard")
    before = [shard.read(i) for i in (3, 0, 2)]
    monkeypatch.delattr(os, "pread")
    assert [shard.read(i) for i in (3, 0, 2)] == before
    shard.close()


def test_the_server_imports():
    """The server and the code of its processes can be imported without the packages."""
    code = BLOCK + "import blip_fast.serve.server, blip_fast.serve.workers.decoder, blip_fast.serve.workers.worker"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
