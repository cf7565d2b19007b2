"""A server under load beside the offline engine: `python -m blip_bench.cases.serving`.

Both caption the same photographs with the same model, batch and threads, and take turns on the same machine;
while one is measured the other waits. The server's share of the machine includes its clients, HTTP, and one
upload for each picture.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from blip_bench import words
from blip_bench.machine import machine
from blip_fast.checkpoint.native import save_native
from blip_fast.generate import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.scenes.scenes import draw, sample_scenes
from blip_fast.tasks.captioner import PROMPT, Captioner

SEED = 0
GENERATION = GenerationConfig(beams=3, max_length=20, min_length=5)  # the server's own


@dataclass
class Load:
    """What the clients saw: statuses, latencies of requests answered with 200, and captions by picture."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    captions: dict[int, set[str]] = field(default_factory=dict)

    def percentile(self, share: float) -> float:
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def small_model(directory: Path) -> Path:
    """ViT-S and a text stack of the same width, 224 px, with random weights."""
    torch.manual_seed(SEED)
    text = TextConfig(width=384, layers=6, heads=6, mlp_width=1536)
    config = BlipConfig(VisionConfig(224, 16, 384, 12, 6), text, text_stacks="decoder", contrastive=False,
                        matching=False)
    save_native(BlipModel(config), words.tokenizer(), directory)
    return directory


def photographs(folder: Path, number: int) -> list[Path]:
    """JPEGs of drawn scenes, 480 × 480."""
    folder.mkdir()
    random = np.random.default_rng(SEED)
    for i, scene in enumerate(sample_scenes(number, "train", SEED)):
        draw(scene, 480, random).save(folder / f"{i:03}.jpg", quality=90)
    return sorted(folder.iterdir())


@contextmanager
def served(model: str, threads: int, batch: int, queue: int, log: Path) -> Iterator[int]:
    """Run a server in its own process. Yields its port once it is ready."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "blip_fast", "serve", "--model", model, "--dtype", "float32",
             "--port", "0", "--threads", str(threads), "--batch-size", str(batch), "--queue", str(queue),
             "--devices", "cpu"],
            stderr=stderr)
    try:
        while not (found := re.search(r"listening at http://\S+:(\d+)/", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()}")
            time.sleep(0.2)
        asyncio.run(_until_ready(int(found[1])))
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


async def _until_ready(port: int) -> None:
    request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while (await _ask(port, request))[0] != 200:
        await asyncio.sleep(0.2)


async def _ask(port: int, request: bytes) -> tuple[int, bytes, int]:
    """The answer's status, body, and Retry-After in seconds (0 if there is none)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    again = re.search(rb"(?i)\r\nretry-after: *(\d+)", head)
    return int(head.split()[1]), body, int(again[1]) if again else 0


def upload(content: bytes) -> bytes:
    """A request with one picture, as a browser would send it."""
    body = (b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n--b--\r\n")
    return (b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\nConnection: close\r\n\r\n" + body)


async def load(port: int, uploads: Sequence[bytes], clients: int, seconds: float, found: Load) -> None:
    """Run clients that send the next request as soon as they are answered, or after Retry-After."""
    numbers, began = cycle(range(len(uploads))), time.perf_counter()

    async def ask() -> None:
        while time.perf_counter() - began < seconds:
            number, asked = next(numbers), time.perf_counter()
            status, body, again = await _ask(port, uploads[number])
            found.statuses[status] += 1
            if status == 200:
                found.latencies.append(time.perf_counter() - asked)
                text = json.loads(body)["results"][0]["captions"][0]["text"]
                found.captions.setdefault(number, set()).add(text)
            await asyncio.sleep(again)

    await asyncio.gather(*(ask() for _ in range(clients)))
    found.seconds += time.perf_counter() - began


def offline(captioner: Captioner, pictures: Sequence[Path], seconds: float, batch: int) -> tuple[int, float]:
    """Feed pictures to the engine for so many seconds. Returns how many it captioned, in how many seconds."""
    began = time.perf_counter()
    given = takewhile(lambda _: time.perf_counter() - began < seconds, cycle(pictures))
    captioned = captioner.stream(given, generation=GENERATION, batch_size=batch, ordered=False)
    return sum(1 for _ in captioned), time.perf_counter() - began


def compare(model: str, pictures: Sequence[Path], log: Path, args: Namespace) -> dict[str, Any]:
    """Let both take turns, and return the figures; `log` is the server's."""
    captioner = Captioner.from_pretrained(model, dtype="float32", threads=args.threads, device="cpu")
    expected = [caption.caption for caption in captioner(pictures, PROMPT, GENERATION, batch_size=args.batch)]
    uploads, found, alone = [upload(path.read_bytes()) for path in pictures], Load(), (0, 0.0)
    with served(model, args.threads, args.batch, args.queue, log) as port:
        asyncio.run(load(port, uploads, args.clients, 5.0, Load()))
        for _ in range(args.rounds):
            number, seconds = offline(captioner, pictures, args.seconds / args.rounds, args.batch)
            alone = alone[0] + number, alone[1] + seconds
            asyncio.run(load(port, uploads, args.clients, args.seconds / args.rounds, found))
    served_rate, offline_rate = len(found.latencies) / found.seconds, alone[0] / alone[1]
    return {"machine": machine(), "clients": args.clients, "seconds": round(found.seconds, 1),
            "statuses": dict(found.statuses), "images_per_second": round(served_rate, 2),
            "offline_images_per_second": round(offline_rate, 2),
            "ratio": round(served_rate / offline_rate, 3),
            **{f"p{100 * share:g}_seconds": round(found.percentile(share), 3) for share in (0.5, 0.9, 0.99)},
            "captions_differ": sum(captions != {expected[number]}
                                   for number, captions in found.captions.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON object. Returns 1 if a status other than 200 or 429 occurred, or a caption differs."""
    parser = ArgumentParser(prog="python -m blip_bench.cases.serving", description=__doc__)
    add = parser.add_argument
    add("--model", type=str | None, help="a captioning checkpoint (default: a small one with random weights)")
    add("--clients", type=int, default=64)
    add("--seconds", type=float, default=120.0,
        help="of load, in all rounds together, and of the offline engine")
    add("--rounds", type=int, default=4, help="turns of each")
    add("--pictures", type=int, default=64, help="different ones")
    add("--threads", type=int, default=2, help="of both engines")
    add("--batch", type=int, default=16, help="of both engines")
    add("--queue", type=int, default=128)
    args = parser.parse_args(None if arguments is None else list(arguments))
    with TemporaryDirectory() as folder:
        model = args.model or str(small_model(Path(folder, "model")))
        figures = compare(model, photographs(Path(folder, "pictures"), args.pictures),
                          Path(folder, "log"), args)
    print(json.dumps(figures, indent=2))
    return int(bool(set(map(int, figures["statuses"])) - {200, 429} or figures["captions_differ"]))


if __name__ == "__main__":
    sys.exit(main())
