"""Work spread over a Ray cluster by Ray Data: the same worker as on one machine, results in order."""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKER_CPUS = 4  # of a worker without a GPU
ANSWER_SECONDS = 10  # within which a cluster must accept a connection; Ray itself tries for minutes


def ask_worker(address: str | None, question: Callable[[], Result], *, gpus: bool) -> Result:
    """The result of `question()` in a process with a worker's share of a cluster. Arguments and errors are
    those of `on_ray`."""
    with _cluster(address) as ray:
        _, share = _room(ray.cluster_resources(), gpus)
        return ray.get(ray.remote(**share)(lambda: question()).remote())


def on_ray(address: str | None, batches: Iterable[Sequence[Item]],
           make_worker: Callable[[], Callable[[Sequence[Item]], Iterable[Result]]], *,
           gpus: bool) -> Generator[Result]:
    """The results of `worker(batch)` for all batches, in order. A batch whose machine is lost is done again
    elsewhere.

    Args:
        address: of a cluster, as `ray.init` takes it; None is the one that RAY_ADDRESS names or that runs
            here, else one is started here.
        batches: all of them are drawn first, and kept pickled in Ray's object store.
        make_worker: makes each process's worker, at its first batch. It and all results are pickled.
        gpus: give each worker a GPU if the cluster has any, else WORKER_CPUS processors. There are as many
            workers as the cluster has room for.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at `address`.
        ValueError: a worker raised; its message.
    """
    with _cluster(address) as ray:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.execution_options.preserve_order = False, True
        work = [{"batch": pickle.dumps(batch)} for batch in batches]
        count, share = _room(ray.cluster_resources(), gpus)
        done = ray.data.from_items(work, override_num_blocks=max(1, len(work))).map_batches(
            _worker_class(make_worker), batch_size=1, compute=ray.data.ActorPoolStrategy(size=count), **share)
        for block in done.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(pickle.loads, block["result"])


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; what fails on a worker becomes a ValueError."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Ray is not installed: pip install 'blip-fast[scale]'",
                                  name="ray") from None

    _require_answer(address)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    except RayError as error:
        raise ValueError(f"a worker on Ray failed: {_root(error)}") from error
    finally:
        ray.shutdown()


def _require_answer(address: str | None) -> None:
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from None


def _room(resources: Mapping[str, float], gpus: bool) -> tuple[int, dict[str, Any]]:
    """How many workers there are, and what each of them needs."""
    if gpus and resources.get("GPU", 0) >= 1:
        return int(resources["GPU"]), {"num_gpus": 1}
    processors = int(resources.get("CPU", 1))
    return max(1, processors // WORKER_CPUS), {"num_cpus": min(processors, WORKER_CPUS)}


def _worker_class(make_worker: Callable[[], Callable[[Sequence[Any]], Iterable[Any]]]) -> type:
    class Worker:
        """One process of the pool."""

        worker = None

        def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
            self.worker = self.worker or make_worker()
            for batch in rows["batch"]:
                for result in self.worker(pickle.loads(batch)):
                    yield {"result": [pickle.dumps(result)]}

    return Worker


def _root(error: BaseException) -> BaseException:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return error
