"""The server apart from HTTP: its decoder and worker processes, and the requests that they handle."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blip_fast.serve.http.fetching import Fetcher
from blip_fast.serve.http.forms import Link, Picture
from blip_fast.serve.http.guard import House
from blip_fast.serve.http.observing import Observing
from blip_fast.serve.refusals import Refused, not_an_image, not_ready, worker_lost
from blip_fast.serve.settings import Settings
from blip_fast.serve.workers import decoder, worker
from blip_fast.serve.workers.messages import Message
from blip_fast.serve.workers.processes import Crew
from blip_fast.serve.workers.served_models import WorkerOptions

MOST_SHOWN = 10_000  # search hits whose thumbnails can still be requested
OPTIONS = {"score": "--matcher", "ask": "--answerer", "search": "--index", "explain": "--explain",
           "caption": "--model with a captioning checkpoint"}


class Service:
    """One server's state. If a worker cannot start, `failure` is its sentence, and `on_failure` is called."""

    def __init__(self, settings: Settings, fetch: Fetcher | None = None) -> None:
        """`fetch` downloads pictures by URL (default: a `Fetcher` made from the settings)."""
        self.settings, limits = settings, settings.limits
        self.failure: str | None = None
        self.on_failure = lambda: None
        options = WorkerOptions(**settings.worker)
        self.house = House(limits)
        workers = [(replace(options, loading={**options.loading, "device": device}),)
                   for device in settings.devices]
        self.workers = Crew("workers", worker.main, workers, depth=2 * options.batch_size,
                            patience=limits.seconds, lost=worker_lost, failed=self._record_failure)
        self.decoders = Crew("decoders", decoder.main, [(limits.pixels,)] * settings.decoders, depth=1,
                             patience=limits.decode_seconds,
                             lost=lambda: not_an_image("No decoder survives the file"),
                             failed=self._record_failure)
        self.observing = Observing([self.workers, self.decoders], lambda: self.house.taken)
        self._fetch = fetch or Fetcher(settings.url_hosts, limits.upload_bytes, limits.seconds)
        self._shown: OrderedDict[str, dict[str, Any]] = OrderedDict()  # hit id → where its picture is stored

    def start(self) -> None:
        self.workers.start()
        self.decoders.start()

    async def stop(self) -> None:
        await self.workers.stop()
        await self.decoders.stop()

    @property
    def ready(self) -> bool:
        """Whether all workers have loaded, a decoder is running, and the server accepts requests."""
        return (self.workers.ready == self.workers.size and self.decoders.ready > 0
                and not self.house.draining)

    def info(self) -> dict[str, Any]:
        """The answer of /v1/info: the model, the tasks served, and the limits."""
        limits, sizes = self.settings.limits, (self.workers.info or {}).get("sizes", {})
        shown = ("upload_bytes", "pixels", "images", "texts", "text_characters", "seconds")
        worker = self.settings.worker
        names = (worker.get(option) for option in ("model", "matcher", "answerer", "index"))
        name = next(filter(None, names), "")
        return {"model": Path(name).name if Path(name).exists() else name,  # hide the local path
                "version": version("blip-fast"),
                "features": {task: task in sizes for task in OPTIONS},
                "limits": {**{name: getattr(limits, name) for name in shown}, "captions": limits.captions},
                "auth": self.settings.api_key is not None}

    async def caption(self, picture: Picture | Link, num: int, prompt: str | None) -> list[dict[str, Any]]:
        """Captions of a picture, best first. Raises Refused."""
        size, pixels = await self._model_pixels("caption", picture)
        result, _ = await self.workers.do({"kind": "caption", "size": size, "prompt": prompt}, pixels)
        self.observing.worked("caption", result.pop("batch"))
        return result["captions"][:num]

    async def about(self, task: str, picture: Picture | Link | None, fields: dict[str, Any]) -> Message:
        """The result of any other task: about a picture, or a search by text. Raises Refused."""
        if picture is None:
            head, blob = {"size": self._size(task)}, b""
        elif task == "explain":
            size = self._size(task)
            decoded, blob = await self._decode(picture, size, panel=True)
            head = {"size": size, "panel": decoded["panel"]}
        else:
            size, blob = await self._model_pixels(task, picture)
            head = {"size": size}
        result, blob = await self.workers.do({"kind": task, **head, **fields}, blob)
        self.observing.worked(task, result.pop("batch", None))
        return result, blob

    async def search(self, picture: Picture | Link | None, fields: dict[str, Any]) -> list[dict[str, Any]]:
        """Hits, each with an `id` that `thumbnail` accepts. Raises Refused."""
        found, _ = await self.about("search", picture, fields)
        hits = []
        for hit in found["hits"]:
            number = secrets.token_urlsafe(9)
            self._shown[number] = hit.pop("where")
            hits.append({"id": number, **hit, "image": f"/v1/indexed/{number}"})
        while len(self._shown) > MOST_SHOWN:
            self._shown.popitem(last=False)
        return hits

    async def thumbnail(self, number: str) -> bytes:
        """A hit's picture as JPEG. Only pictures that a search returned are available. Raises Refused."""
        where = self._shown.get(number)
        if where is None:
            raise Refused(404, "not_found", "There is no such hit (any more): search again.")
        return (await self.decoders.do(where))[1]

    async def _model_pixels(self, task: str, picture: Picture | Link) -> tuple[int, bytes]:
        """The task's image size, and the picture's pixels at that size."""
        size = self._size(task)
        return size, (await self._decode(picture, size, panel=False))[1]

    async def _decode(self, picture: Picture | Link, size: int, panel: bool) -> Message:
        if isinstance(picture, Refused):
            raise picture
        body = await self._fetch(picture.url) if isinstance(picture, Link) else picture
        return await self.decoders.do({"size": size, "panel": panel}, body)

    def _size(self, task: str) -> int:
        """The side of the task's input images, in pixels."""
        if self.workers.info is None or not self.workers.ready:
            raise not_ready()
        size = self.workers.info["sizes"].get(task)
        if size is None:
            code = "no_index" if task == "search" else "not_served"
            raise Refused(404, code, f"This server does not {task}: start it with {OPTIONS[task]}.")
        return size

    def _record_failure(self, sentence: str) -> None:
        self.failure = self.failure or sentence
        self.on_failure()
