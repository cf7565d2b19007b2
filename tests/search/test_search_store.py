"""The index on disk: exact blockwise search, leftovers of a killed writer, changes, compaction, bounded
memory."""

import os
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_fast.data.shards.named_images import expand
from blip_fast.data.shards.shard_cache import shard_cache
from blip_fast.media.images import StoredImage
from blip_fast.search import store as store_module
from blip_fast.search.approximate import graph_of, nearest_rows
from blip_fast.search.store import BROKEN, DATABASE, Entry, Store, Version, printable
from blip_fast.search.topk import top_rows

NO_HOLES = np.empty(0, np.int64)


def unit_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def blocks_of(rows: np.ndarray, size: int):
    return ((first, rows[first : first + size]) for first in range(0, len(rows), size))


def entry(name: str, result, mtime_ns: int = 1) -> Entry:
    return Entry(StoredImage(name, Path(name)), Version(0, 10, mtime_ns), result)


def store_of(directory: Path, rows: np.ndarray, storage: str = "float32") -> Store:
    store = Store.create(directory, rows.shape[1], storage, {})
    with store.writing():
        store.write([entry(f"/photos/{i}.jpg", row) for i, row in enumerate(rows)])
    return store


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 25), st.sets(st.integers(0, 59)),
       st.integers(0, 99))
def test_top_rows_are_a_full_sort_s(count, block, wanted, holes, seed):
    """Equal to float64 brute force for any block size; duplicate rows keep their order."""
    rows = unit_rows(7, 5, seed)[np.random.default_rng(seed).integers(0, 7, count)]
    query = unit_rows(1, 5, seed + 1)[0]
    numbers, scores = top_rows(blocks_of(rows, block), query, wanted, np.array(sorted(holes), np.int64))
    exact = (rows.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    expected = sorted((-score, i) for i, score in enumerate(exact.tolist()) if i not in holes)[:wanted]
    assert list(zip((-scores).tolist(), numbers.tolist(), strict=True)) == expected


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_store_gives_back_what_it_was_given(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK", 4)
    rows = unit_rows(10, 6)
    store_of(tmp_path / "new", rows, storage).close()
    store = Store(tmp_path / "new")
    assert len(store) == store.row_count == 10
    assert np.array_equal(np.concatenate([block for _, block in store.blocks()]), rows.astype(storage))
    assert np.array_equal(store.rows(np.array([7, 2])), rows[[7, 2]].astype(storage))
    assert [image.name for image in store.images([3, 0])] == ["/photos/3.jpg", "/photos/0.jpg"]
    assert store.version("/photos/3.jpg") == Version(0, 10, 1) and store.version("/photos/10.jpg") is None
    assert (tmp_path / "new" / f"features.0.{storage}").stat().st_size == 60 * np.dtype(storage).itemsize


def test_changed_and_broken_images_leave_holes_that_compaction_fills(tmp_path):
    rows, new = unit_rows(6, 4), unit_rows(1, 4, 9)[0]
    store = store_of(tmp_path, rows)
    with store.writing():
        store.write([entry("/photos/1.jpg", new, 2), entry("/photos/4.jpg", "cut short", 2),
                     entry("/x.jpg", "empty")])
        assert (len(store), store.holes().tolist(), store.report_broken()) == (5, [1, 4], 2)
        assert "cut short" in (tmp_path / BROKEN).read_text() and store.version("/photos/4.jpg") is None
        store.compact()
        assert (len(store), store.row_count, store.holes().tolist()) == (5, 5, [])
        assert [image.name for image in store.images(range(5))] == [
            "/photos/0.jpg", "/photos/2.jpg", "/photos/3.jpg", "/photos/5.jpg", "/photos/1.jpg"]
        assert np.array_equal(store.rows(np.arange(5)), [*rows[[0, 2, 3, 5]], new])
        assert [path.name for path in tmp_path.glob("features.*")] == ["features.1.float32"]
        store.write([entry("/photos/4.jpg", new, 3), entry("/x.jpg", new)])
        assert store.report_broken() == 0 and not (tmp_path / BROKEN).exists()
    assert len(Store(tmp_path)) == 7


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    """Features after the committed rows do not count, whether they are whole rows or half a row."""
    rows = unit_rows(4, 4)
    store = store_of(tmp_path, rows[:2])
    with (tmp_path / "features.0.float32").open("ab") as stream:
        stream.write(b"\xff" * 23)
    store = Store(tmp_path)
    assert len(store) == 2 and [len(block) for _, block in store.blocks()] == [2]
    with store.writing():
        store.write([entry("/a.jpg", rows[2]), entry("/b.jpg", rows[3])])
    assert np.array_equal(store.rows(np.arange(4)), rows)
    assert (tmp_path / "features.0.float32").stat().st_size == 64


def test_a_write_that_fails_changes_nothing(tmp_path):
    rows = unit_rows(3, 4)
    store = store_of(tmp_path, rows)
    with store.writing(), pytest.raises(sqlite3.IntegrityError):
        store.write([entry("/photos/1.jpg", rows[0], 2), entry("/bad.jpg", rows[0], mtime_ns=None)])
    assert (len(store), store.row_count, store.holes().tolist()) == (3, 3, [])
    assert store.version("/photos/1.jpg") == Version(0, 10, 1)


@pytest.mark.parametrize("name", ["a\nb.jpg", "Füße 犬 🐕.jpg", os.fsdecode(b"no utf-8 \xff.jpg"),
                                  "a'; DROP--.jpg"])
def test_odd_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    (image,) = expand([str(tmp_path / name)], shard_cache(str(tmp_path), 1))
    store = Store.create(tmp_path / "index", 2, "float32", {})
    with store.writing():
        store.write([Entry(image, Version.of(image), np.ones(2, np.float32))])
    assert store.images([0]) == [image] and store.version(image.name) == Version.of(image)
    line = printable(name)
    assert "\n" not in line and line.encode() and ("犬" not in name or line == name)


def test_missing_files_and_members_of_a_rewritten_shard(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.jpg", "b.jpg"):
            tar.add(tmp_path / name, name)
    store = Store.create(tmp_path / "index", 2, "float32", {})

    def index(source: Path) -> None:
        images = expand([str(source)], shard_cache(str(tmp_path), 1))
        with store.writing():
            store.write([Entry(image, Version.of(image), np.ones(2, np.float32)) for image in images])

    for source in (tmp_path / "a.jpg", tmp_path / "b.jpg", shard):
        index(source)
    assert len(store) == 4 and not [*store.missing()]
    (tmp_path / "b.jpg").unlink()
    with tarfile.open(shard, "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
    os.utime(shard, ns=(1, 1))
    index(shard)
    gone = [str(tmp_path / "b.jpg"), f"{shard}/b.jpg"]
    assert sorted(store.missing()) == gone
    with store.writing():
        store.drop(store.missing())
    assert len(store) == 2 and not [*store.missing()]


def test_one_writer_and_readers_beside_it(tmp_path):
    store = store_of(tmp_path, unit_rows(3, 4))
    other = Store(tmp_path)
    with store.writing():
        with pytest.raises(ValueError, match="another process"), other.writing():
            pass
        with other.snapshot():
            assert other.row_count == 3
        store.write([entry("/a.jpg", np.ones(4, np.float32))])
    assert other.row_count == 4


def test_what_is_no_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        Store(tmp_path)
    store_of(tmp_path / "a", unit_rows(3, 4)).close()
    with pytest.raises(FileExistsError, match="already"):
        Store.create(tmp_path / "a", 4, "float32", {})
    with pytest.raises(ValueError, match="storage must be one of"):
        Store.create(tmp_path / "b", 4, "int8", {})
    (tmp_path / "a" / "features.0.float32").write_bytes(b"short")
    with pytest.raises(ValueError, match="5 of 48 bytes"):
        Store(tmp_path / "a")
    (tmp_path / "a" / DATABASE).write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="no readable index"):
        Store(tmp_path / "a")


@pytest.mark.parametrize("backend", ["faiss", "usearch"])
def test_a_graph_finds_most_of_the_exact_rows(tmp_path, backend):
    """Rows are clustered like features. Rows added later enter the graph; holes are never found."""
    pytest.importorskip(backend, reason=f"approximate search needs the extra `{backend}`")
    centres = unit_rows(50, 32, 1)
    rows = centres[np.arange(2000) % 50] + 0.3 * unit_rows(2000, 32, 2)
    store = store_of(tmp_path, rows[:1500])
    assert len(graph_of(store, backend)) == 1500
    with store.writing():
        store.write([entry(f"/later/{i}.jpg", row) for i, row in enumerate(rows[1500:])])
        store.drop(f"/photos/{i}.jpg" for i in range(0, 500, 50))
    graph, holes, found = graph_of(store, backend), store.holes(), 0
    for query in centres:
        exact, _ = top_rows(store.blocks(), query, 10, holes)
        near = nearest_rows(graph, holes, query, 10)
        assert not np.isin(near, holes).any() and np.array_equal(near, np.unique(near))
        found += np.isin(exact, near).sum()
    assert found >= 0.95 * 500
    assert [path.name for path in tmp_path.glob("graph.0.*")] == [f"graph.0.{backend}"]


QUERY = """
import sys
import numpy as np
from blip_fast.search.store import Store
from blip_fast.search.topk import top_rows
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1e3
store = Store(sys.argv[1])
query = np.random.default_rng(1).normal(size=256)
top_rows([(0, np.ones((4096, 256), np.float32))], query, 20, np.empty(0, np.int64))  # what any block costs
before = peak()
rows, _ = top_rows(store.blocks(), query, 20, store.holes())
print(peak() - before, *rows)
"""


def test_memory_does_not_grow_with_the_index(tmp_path):
    """200,000 × 256 float32 are 205 MB. A query on them needs less than 25 MB more than a query on one
    block."""
    rows = np.random.default_rng(0).normal(size=(200_000, 256)).astype(np.float32)
    store = Store.create(tmp_path, 256, "float32", {})
    with store.writing():
        for first in range(0, len(rows), 20_000):
            store.write([entry(f"/{i}.jpg", rows[i]) for i in range(first, first + 20_000)])
    done = subprocess.run([sys.executable, "-c", QUERY, str(tmp_path)], capture_output=True, text=True,
                          check=True)
    grown, *found = done.stdout.split()
    exact = rows.astype(np.float64) @ np.random.default_rng(1).normal(size=256)
    assert [int(row) for row in found] == np.argsort(-exact)[:20].tolist()
    print(f"\n{grown} MB")
    assert float(grown) < 25
