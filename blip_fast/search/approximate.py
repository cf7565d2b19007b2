"""Approximate search by faiss or usearch: an HNSW graph over an index's rows, stored in the index's
directory.

A graph only proposes rows; their cosines are computed again from the features. It is updated before each
search, by one process at a time.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from blip_fast.checkpoint.files import whole_file
from blip_fast.search.store import Store

BACKENDS = ("exact", "faiss", "usearch")
NEIGHBOURS = 32  # edges per row in the graph
EXPLORED = 256  # rows explored to insert a row; for a query, at least as many


class Graph(Protocol):
    """Rows 0, 1, … with edges to near ones."""

    def __len__(self) -> int: ...
    def add(self, features: NDArray[np.float32]) -> None: ...
    def save(self, path: Path) -> None: ...
    def search(self, query: NDArray[np.float32], count: int) -> NDArray[np.int64]: ...


class _Faiss:
    """`pip install faiss-cpu`."""

    def __init__(self, width: int, path: Path | None) -> None:
        self._faiss = _module("faiss", "faiss-cpu")
        if path is not None:
            self._index = self._faiss.read_index(str(path))
            return
        self._index = self._faiss.IndexHNSWFlat(width, NEIGHBOURS, self._faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = EXPLORED

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, features: NDArray[np.float32]) -> None:
        self._index.add(features)

    def save(self, path: Path) -> None:
        self._faiss.write_index(self._index, str(path))

    def search(self, query: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        self._index.hnsw.efSearch = max(EXPLORED, count)
        _, found = self._index.search(query[None], count)
        return found[0][found[0] >= 0]


class _Usearch:
    """`pip install usearch`."""

    def __init__(self, width: int, path: Path | None) -> None:
        usearch = _module("usearch.index", "usearch")
        self._index = usearch.Index.restore(str(path)) if path is not None else usearch.Index(
            ndim=width, metric="ip", dtype="f32", connectivity=NEIGHBOURS, expansion_add=EXPLORED)

    def __len__(self) -> int:
        return len(self._index)

    def add(self, features: NDArray[np.float32]) -> None:
        self._index.add(np.arange(len(self), len(self) + len(features)), features)

    def save(self, path: Path) -> None:
        self._index.save(str(path))

    def search(self, query: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        self._index.expansion_search = max(EXPLORED, count)
        return self._index.search(query, count).keys.astype(np.int64)


_GRAPHS = {"faiss": _Faiss, "usearch": _Usearch}


def graph_of(store: Store, backend: str) -> Graph:
    """The graph of all rows, after inserting new ones.

    Raises ModuleNotFoundError, naming the pip package, if the backend is not installed.
    """
    path = store.directory / f"graph.{store.generation}.{backend}"
    with FileLock(store.directory / "graph.lock"):
        graph = _GRAPHS[backend](store.width, path if path.exists() else None)
        if len(graph) < store.row_count:
            for _, block in store.blocks(len(graph)):
                graph.add(np.ascontiguousarray(block, np.float32))
            with whole_file(path) as partial:
                graph.save(partial)
    return graph


def nearest_rows(graph: Graph, holes: NDArray[np.int64], query: NDArray[np.float32],
                 count: int) -> NDArray[np.int64]:
    """Approximately the `count` rows with the largest products with the query [width], sorted by number,
    without holes."""
    wanted = min(len(graph), count + len(holes))
    return np.setdiff1d(graph.search(query, wanted), holes) if wanted else np.empty(0, np.int64)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"approximate search needs {package}: "
                                  f"`pip install {package}`, or search exactly",
                                  name=package) from None
