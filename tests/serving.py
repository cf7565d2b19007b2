"""What tests of the server share: small models, a server in this process with real processes around it, odd uploads."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from odd_files import encoded, picture

from blip_fast.checkpoint.native import save_native
from blip_fast.commands.serve import settings_from
from blip_fast.config import BlipConfig, SpecialTokens, TextConfig, TextStacks, VisionConfig
from blip_fast.model import BlipModel
from blip_fast.serve.app import make_app
from blip_fast.serve.service import Service
from blip_fast.serve.settings import Settings
from blip_fast.tokenizer import Tokenizer

IMAGE_SIZE = 64
CAPTIONS = ["a picture of a red ball on a table", "two dogs run over the green grass", "a man rides a horse",
            "the small blue square is left of the large circle", "people sit at a long wooden table and eat"]
HOST = "http://localhost"


def write_model(directory: Path, stacks: TextStacks) -> Path:
    """A small model, weights drawn from seed 0, that writes texts of several lengths."""
    tokenizer = Tokenizer.train(CAPTIONS, 120)
    heads = stacks == "tied"
    config = BlipConfig(
        VisionConfig(IMAGE_SIZE, 16, 64, 2, 4), TextConfig(tokenizer.vocab_size, 64, 3, 4, 128),
        SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id, tokenizer.enc_id),
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
    """As the command line has them."""
    return settings_from([str(argument) for argument in arguments])


def photos(count: int, kind: str = "JPEG") -> list[bytes]:
    return [encoded(picture(60 + i, 40, seed=i), kind) for i in range(count)]


def files(pictures: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """A form's pictures as httpx takes them."""
    return [("image", (f"{i}.jpg", content)) for i, content in enumerate(pictures)]


def in_json(pictures: Sequence[bytes], **fields: Any) -> dict[str, Any]:
    return {"images": [{"base64": base64.b64encode(content).decode()} for content in pictures], **fields}


class Running:
    """A service on an event loop of its own, and a client that asks its application directly."""

    def __init__(self, service: Service) -> None:
        self.service, self.loop = service, asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url=HOST, timeout=1200)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result(1800)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.post(path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.get(path, **options))

    async def until(self, holds: Callable[[], bool], seconds: float = 1200) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.02)


@contextmanager
def running(settings: Settings, **options: Any) -> Iterator[Running]:
    """A server whose workers have their models."""
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


def as_zip() -> bytes:
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("payload.txt", "hidden")
    return stream.getvalue()
