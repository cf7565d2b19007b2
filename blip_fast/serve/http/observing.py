"""Metrics for Prometheus, and one log line per request.

Neither contains anything that a client has sent: routes are named by their pattern in this code, never by the
requested path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blip_fast.serve.workers.processes import Crew

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64)

_log = logging.getLogger("blip_fast.serve")


class Observing:
    """The metrics of one server, in their own registry."""

    def __init__(self, crews: list[Crew], seats: Callable[[], int]) -> None:
        """`seats` returns how many seats are taken (`House.taken`)."""
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("blip_fast_requests", "Requests that were answered", ("route", "status"),
                                 registry=registry)
        self._seconds = Histogram("blip_fast_request_seconds", "From a request's head to its answer's end",
                                  ("route",), buckets=SECONDS, registry=registry)
        self._images = Counter("blip_fast_images",
                               "Pictures that were worked on; their rate is images a second",
                               ("task",), registry=registry)
        self._batch = Histogram("blip_fast_batch_images",
                                "Pictures that were worked on together when one was finished",
                                ("task",), buckets=IMAGES, registry=registry)
        queue = Gauge("blip_fast_queue_length", "Pictures and questions that are in the house",
                      registry=registry)
        queue.set_function(seats)
        gauges = [Gauge(f"blip_fast_{name}", help, ("processes",), registry=registry) for name, help in (
            ("jobs_waiting", "Jobs that no process has taken yet"),
            ("processes_ready", "Processes that take jobs"),
            ("process_restarts", "Processes that ended and were replaced"))]
        for crew in crews:
            for gauge, read in zip(gauges, (lambda crew: crew.waiting, lambda crew: crew.ready,
                                            lambda crew: crew.restarts), strict=True):
                gauge.labels(crew.name).set_function(lambda crew=crew, read=read: read(crew))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record a finished request. Its status is 499 if the client disconnected."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        _log.info("%s %s %d %.3f s", method, route, status, seconds)

    def worked(self, task: str, batch: int | None = None) -> None:
        """Record one result of a task, and the size of the batch that it was computed in."""
        self._images.labels(task).inc()
        if batch is not None:
            self._batch.labels(task).observe(batch)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
