"""Shards under URLs: the same batches as from the directory, complete copies or none, and a bounded cache
shared by processes."""

import http.server
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import fsspec
import odd_files
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from patience import until

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")
from blip_fast.data.input.pipeline import EvaluationInput, InputConfig, TrainInput
from blip_fast.data.input.sources import Source
from blip_fast.data.shards import shard_cache
from blip_fast.data.shards.shard_cache import ShardCache
from blip_fast.data.shards.shards import Sample, read_index, write_shards

SHARDS, SAMPLES = 5, 4


class Faulty(MemoryFileSystem):
    """A memory file system whose fetches fail as `faults` say, in order: "broken" or "short"."""

    faults: list[str]
    fetched: list[str]

    def get_file(self, rpath, lpath, **options):
        Faulty.fetched.append(rpath)
        fault = Faulty.faults.pop(0) if Faulty.faults else None
        if fault == "broken":
            raise ConnectionResetError("connection reset by peer")
        super().get_file(rpath, lpath, **options)
        if fault == "short":
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:1000])


@pytest.fixture(autouse=True)
def faulty_memory(monkeypatch) -> None:
    fsspec.register_implementation("memory", Faulty, clobber=True)
    Faulty.faults, Faulty.fetched = [], []
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    images = [odd_files.encoded(odd_files.picture(30, 20, seed=i), "PNG") for i in range(SHARDS * SAMPLES)]
    write_shards([Sample(f"{i:02d}", image, {"captions": [f"picture {i}"]})
                  for i, image in enumerate(images)],
                 folder / "good", samples_per_shard=SAMPLES)
    return folder / "good"


@pytest.fixture
def url(directory: Path) -> str:
    """The tars and the index; the `.idx` files are not needed."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in [*directory.glob("*.tar"), directory / "shards.json"]:
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return "memory://bucket"


def train_input(root: str | Path, cache: Path, gigabytes: float = 1.0) -> TrainInput:
    return TrainInput(InputConfig([Source("pictures", str(root))], image_size=16, batch_size=4,
                                  shuffle_buffer=6, threads=1, cache=str(cache), cache_gb=gigabytes))


def epochs(source: TrainInput, count: int) -> list:
    return [batch for _ in range(count) for batch in source]


def same(ours: list, theirs: list) -> bool:
    return all(torch.equal(a.images, b.images) and a.keys == b.keys
               for a, b in zip(ours, theirs, strict=True))


def test_a_url_gives_the_batches_of_the_directory(directory, url, tmp_path) -> None:
    local, remote = train_input(directory, tmp_path / "unused"), train_input(url, tmp_path / "cache")
    assert same(epochs(remote, 3), epochs(local, 3))
    assert len(Faulty.fetched) == SHARDS  # once, for three epochs
    remote.load_state_dict(local.state_dict())
    assert same(epochs(remote, 1), epochs(local, 1))
    (batch,) = EvaluationInput(url, image_size=16, batch_size=20, threads=1, cache=str(tmp_path / "cache"))
    assert batch.keys == [f"{i:02d}" for i in range(SHARDS * SAMPLES)]
    assert not (tmp_path / "unused").exists()


def test_shards_are_fetched_when_they_are_needed(url, tmp_path) -> None:
    """Opening fetches only the first batches' shards; one share of five fetches only its own."""
    config = InputConfig([Source("a", url)], image_size=16, batch_size=2, shuffle_buffer=2, threads=1,
                         cache=str(tmp_path))
    share = TrainInput(config, rank=0, world_size=5)
    assert Faulty.fetched == []
    epochs(share, 1)
    assert len(set(Faulty.fetched)) == len(Faulty.fetched) < SHARDS


def test_what_fails_in_passing_is_tried_again(directory, url, tmp_path) -> None:
    Faulty.faults = ["broken", "short", "broken", "short"]
    assert same(epochs(train_input(url, tmp_path / "cache"), 1), epochs(train_input(directory, tmp_path), 1))
    assert len(Faulty.fetched) == SHARDS + 4
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tar", ".idx", ".lock"}


def test_what_fails_for_good_is_named(directory, url, tmp_path) -> None:
    shards, files = ShardCache(tmp_path / "cache", 10**9), fsspec.filesystem("memory")
    (shard, *_), tar = read_index(directory).shards, (directory / "000000.tar").read_bytes()
    where = f"{url}/000000.tar"
    for content, words in [
        (tar[:600],
         rf"{where} was not fetched in 5 attempts: it has 600 of {shard.bytes:,} bytes: upload it again"),
        (tar[:-1] + b"x", "its SHA-256 is not the one in shards.json"),
    ]:
        files.pipe_file("/bucket/000000.tar", content)
        with pytest.raises(OSError, match=words):
            shards.open(where, shard)
    files.rm_file("/bucket/000000.tar")
    with pytest.raises(FileNotFoundError, match=rf"{where} is missing, though its shards.json lists it"):
        next(iter(epochs(train_input(url, tmp_path / "cache"), 1)))
    assert not list((tmp_path / "cache").glob("*.part"))
    Faulty.faults = ["broken"] * 9
    with pytest.raises(OSError, match="not fetched in 5 attempts: connection reset by peer"):
        ShardCache(tmp_path / "other", 10**9).open(f"{url}/000001.tar", read_index(directory).shards[1])
    with pytest.raises(FileNotFoundError, match=r"memory://nowhere holds no shards.json"):
        read_index("memory://nowhere")
    with pytest.raises(OSError,
                       match=r"nonsense://x/shards.json cannot be read: Protocol not known: nonsense"):
        read_index("nonsense://x")


def test_the_cache_is_kept_to_its_limit(directory, url, tmp_path) -> None:
    """There is room for three of five tars. All samples are still read, open tars included; the rest is
    fetched again."""
    size = max(shard.bytes for shard in read_index(directory).shards)
    remote, most = train_input(url, tmp_path / "cache", 3 * size / 1e9), 0
    ours = []
    for _ in range(3):
        for batch in remote:
            ours.append(batch)
            most = max(most, size_of_tars(tmp_path / "cache"))
    assert same(ours, epochs(train_input(directory, tmp_path), 3))
    assert len(Faulty.fetched) > SHARDS
    assert most <= 4 * size  # one tar may have just arrived


def size_of_tars(folder: Path) -> int:
    """The size of a cache's tars. Other threads fetch and remove meanwhile, so a listed file may be gone."""
    total = 0
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


OPEN_ALL = """
import sys, time, fsspec
from pathlib import Path
from blip_fast.data.shards.shard_cache import ShardCache
from blip_fast.data.shards.shards import read_index
from fsspec.implementations.local import LocalFileSystem
directory, cache, log, pause = sys.argv[1:]
copy = LocalFileSystem.get_file
def slow(self, source, target, **options):
    with open(log, "a") as stream:
        stream.write(source + chr(10))
    Path(target).write_bytes(b"half")
    time.sleep(float(pause))
    copy(self, source, target, **options)
LocalFileSystem.get_file = slow
for number, shard in enumerate(read_index(directory).shards):
    opened = ShardCache(Path(cache), 10**9).open(f"file://{directory}/{shard.file}", shard)
    assert [len(opened.read(i)[0][0]) > 60 for i in range(shard.samples)] == [True] * shard.samples
"""


def open_all(directory: Path, tmp_path: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", OPEN_ALL, str(directory), str(tmp_path / "cache"),
                             str(tmp_path / "log"), str(pause)], stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache_and_each_tar_is_fetched_once(directory, tmp_path) -> None:
    processes = [open_all(directory, tmp_path, 0.05) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == [""] * 3
    assert len((tmp_path / "log").read_text().splitlines()) == SHARDS


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_taken_for_whole(
    directory, tmp_path
) -> None:
    process = open_all(directory, tmp_path, 60)
    until(lambda: list((tmp_path / "cache").glob("*.part")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "cache").glob("*.part")) and not list((tmp_path / "cache").glob("*.tar"))
    assert open_all(directory, tmp_path, 0).communicate()[1] == ""


class CutsTheFirst(http.server.SimpleHTTPRequestHandler):
    """Cuts the first response with a tar short, although its header promised the whole file."""

    cut = False

    def copyfile(self, source, outputfile) -> None:
        if self.path.endswith(".tar") and not CutsTheFirst.cut:
            CutsTheFirst.cut = True
            outputfile.write(source.read(3000))
        else:
            super().copyfile(source, outputfile)

    def log_message(self, *_) -> None:
        pass


def test_shards_from_a_web_server_that_hangs_up_once(directory, tmp_path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    shutil.copytree(directory, tmp_path / "web")
    handler = partial(CutsTheFirst, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = train_input(f"http://127.0.0.1:{server.server_port}/", tmp_path / "cache")
        assert same(epochs(remote, 1), epochs(train_input(directory, tmp_path), 1))
        server.shutdown()
    assert CutsTheFirst.cut
