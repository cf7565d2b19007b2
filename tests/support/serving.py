"""Helpers for tests of the server: small models, odd uploads, and servers with real processes. `running` has
its HTTP side in this process; `served` is `blip-fast serve` in its own process."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import patience
import torch
from odd_files import encoded, picture
from patience import PATIENCE

from blip_fast.checkpoint.native import save_native
from blip_fast.commands.serve import settings_from
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, TextStacks, VisionConfig
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.serve.app import make_app
from blip_fast.serve.service import Service
from blip_fast.serve.settings import Settings

IMAGE_SIZE = 64
CAPTIONS = ["a picture of a red ball on a table", "two dogs run over the green grass", "a man rides a horse",
            "the small blue square is left of the large circle", "people sit at a long wooden table and eat"]
HOST = "http://localhost"


def write_model(directory: Path, stacks: TextStacks) -> Path:
    """Save a small model with random weights (seed 0) that writes texts of several lengths."""
    tokenizer = Tokenizer.train(CAPTIONS, 120)
    heads = stacks == "tied"
    config = BlipConfig(
        VisionConfig(IMAGE_SIZE, 16, 64, 2, 4), TextConfig(tokenizer.vocab_size, 64, 3, 4, 128),
        SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id,
                      tokenizer.enc_id),
        stacks, contrastive=heads, matching=heads, embed_dim=32)
    torch.manual_seed(0)
    model = BlipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.05))
        assert model.lm_head is not None
        model.lm_head.bias[tokenizer.sep_id] += 4.0
    save_native(model, tokenizer, directory)
    return directory


def settings_of(*arguments: object) -> Settings:
    """The settings of a command line."""
    return settings_from([*map(str, arguments), "--dtype", "float32"])


def photos(count: int, kind: str = "JPEG") -> list[bytes]:
    return [encoded(picture(60 + i, 40, seed=i), kind) for i in range(count)]


def files(pictures: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """A form's pictures for httpx."""
    return [("image", (f"{i}.jpg", content)) for i, content in enumerate(pictures)]


def in_json(pictures: Sequence[bytes], **fields: Any) -> dict[str, Any]:
    return {"images": [{"base64": base64.b64encode(content).decode()} for content in pictures], **fields}


class Running:
    """A service on its own event loop, and a client that calls its application directly."""

    def __init__(self, service: Service) -> None:
        self.service, self.loop = service, asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url=HOST,
                                        timeout=PATIENCE)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result(2 * PATIENCE)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.post(path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.get(path, **options))

    async def until(self, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.02)


@contextmanager
def running(settings: Settings, **options: Any) -> Iterator[Running]:
    """A server whose workers have loaded their models."""
    service = Service(settings, **options)
    server = Running(service)

    async def start() -> None:
        service.start()
        await server.until(lambda: service.ready or service.failure is not None)
        assert service.failure is None, service.failure

    async def stop() -> None:
        await service.stop()
        await server.client.aclose()

    try:
        server.run(start())
        yield server
    finally:
        server.run(stop())
        server.loop.call_soon_threadsafe(server.loop.stop)
        server.thread.join()


class Served:
    """`blip-fast serve` on a free port."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blip_fast", "serve", "--port", "0", "--dtype", "float32",
             *map(str, arguments)],
            stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self.url: str | None = None
        self._heard = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening at (http://\S+)/", line):
                self.url = found[1]
                self._heard.set()
        self._heard.set()

    def ready(self) -> bool:
        return self.get("/ready").status_code == 200

    def wait(self) -> str:
        """Wait until the server is ready. Returns its address."""
        self._heard.wait(PATIENCE)
        assert self.url is not None, self.log
        until(self.ready)
        return self.url

    def ended(self) -> int:
        """Wait until the server has ended and its log is complete. Returns its exit status."""
        status = self.process.wait(PATIENCE)
        self._listener.join()
        return status

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)

    def caption(self, pictures: Sequence[bytes]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/caption", files=files(pictures), timeout=PATIENCE)

    def crews(self) -> list[int]:
        """The process ids of its workers and decoders."""
        children = " ".join(path.read_text()
                            for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"))
        return [int(pid) for pid in children.split()
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds; a server that does not answer yet counts as not holding."""
    def answers() -> bool:
        with suppress(httpx.TransportError):
            return holds()
        return False

    patience.until(answers, pause=0.1)


@contextmanager
def served(*arguments: object) -> Iterator[Served]:
    """A server in its own process that is ready."""
    server = Served(*arguments)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def as_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("payload.txt", "hidden")
    return stream.getvalue()
