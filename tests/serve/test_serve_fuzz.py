"""Bodies that no proper client sends: never a 5xx, never a crash, constant memory."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from odd_files import encoded, good_files, picture

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from serving import as_zip, in_json, running, settings_of, write_model

from blip_fast.serve.http.fetching import Fetcher

PATHS = ("/v1/caption", "/v1/score", "/v1/ask", "/v1/search", "/v1/explain")
BOUNDARY = "boundary"
MULTIPART, JSON = f"multipart/form-data; boundary={BOUNDARY}", "application/json"
TYPES = (MULTIPART, JSON, "application/x-www-form-urlencoded", "multipart/form-data",
         "multipart/form-data; boundary=", "multipart/form-data; boundary=\"", "image/png", "",
         "application/json; charset=utf-16", "multipart/mixed")
PICTURES = [encoded(picture(), "JPEG"), encoded(picture(), "JPEG", progressive=True),
            encoded(picture(), "PNG"),
            encoded(picture(), "WEBP"), encoded(picture(), "WEBP", lossless=True), encoded(picture(), "GIF"),
            encoded(picture(), "BMP"), good_files()["16 bit.png"], good_files()["animated.webp"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    write_model(root / "model", "tied")
    settings = settings_of("--model", root / "model", "--explain", "--max-upload-mb", 0.2,
                           "--max-pixels", 100_000)
    fetch = Fetcher(["pictures.example"], 1000, 1.0, resolve=lambda *name: ["10.0.0.1"])
    with running(settings, fetch=fetch) as server:
        yield server


def form(*parts: tuple[bytes, bytes]) -> bytes:
    """A multipart form of parts' headers and contents."""
    return b"".join(b"--boundary\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + (
        b"--boundary--\r\n")


def file_part(content: bytes, name: bytes = b"image", filename: bytes = b"a.jpg") -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="' + name + b'"; filename="' + filename + b'"', content


def mutated(random: Random, content: bytes) -> bytes:
    """Change, cut off, double, append or insert bytes."""
    body = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(body) + 1)
        match random.randrange(6):
            case 0:
                for place in random.sample(range(len(body)), min(len(body), random.randint(1, 8))):
                    body[place] = random.randrange(256)
            case 1:
                del body[place:]
            case 2:
                body[place:place] = random.randbytes(random.randint(1, 64))
            case 3:
                body += random.choice((as_zip(), b"<script>", b"\0" * 9, bytes(body[:200])))
            case 4:
                body[place:place] = body[place : place + 100]
            case 5:
                body[place : place + 4] = random.choice((b"\xff\xff\xff\xff", b"\0\0\0\0",
                                                         b"\x7f\xff\xff\xff"))
    return bytes(body)


def odd_requests(random: Random) -> Iterator[tuple[str, str, bytes]]:
    """An endless sequence of (path, type, body)."""
    while True:
        path, content = random.choice(PATHS), random.choice(PICTURES)
        whole = form(file_part(content), (b'Content-Disposition: form-data; name="text"', b"a dog"))
        match random.randrange(7):
            case 0 | 1 | 2:  # a valid form around a changed picture
                yield "/v1/caption", MULTIPART, form(file_part(mutated(random, content)))
            case 3:
                yield path, MULTIPART, mutated(random, whole)
            case 4:
                yield path, JSON, mutated(random,
                                          json.dumps(in_json([content[:500]], text="a dog", num=2)).encode())
            case 5:
                yield path, random.choice(TYPES), random.choice((whole, random.randbytes(200), b"",
                                                                 b"{}", b"null"))
            case 6:
                odd = random.choice((b"../../etc/passwd", b"\0", b'"', b"\xff\xfe", b"a" * 5000,
                                     b"image\r\nX: y", b""))
                yield path, MULTIPART, form(file_part(content, *random.sample((odd, b"image"), 2)))


async def ask(server, path: str, kind: str, body: bytes) -> int:
    response = await server.client.post(path, content=body, headers={"Content-Type": kind})
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"code", "message"}
    return response.status_code


async def ask_all(server, count: int, seed: int, at_once: int = 16) -> Counter[int]:
    requests, statuses = odd_requests(Random(seed)), Counter()

    async def some() -> None:
        nonlocal count
        while count > 0:
            count -= 1
            path, kind, body = next(requests)
            status = await ask(server, path, kind, body)
            statuses[status] += 1
            assert status < 500, (status, path, kind, base64.b64encode(body))

    await asyncio.gather(*(some() for _ in range(at_once)))
    return statuses


def memory(server) -> dict[str, float]:
    """Memory in MB of the worker, of each decoder, and of this process."""
    pids = ["self", *server.service.workers.pids, *server.service.decoders.pids]
    lines = (Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1] for pid in pids)
    return {str(pid): int(line.split()[0]) / 1e3 for pid, line in zip(pids, lines, strict=True)}


def check_unharmed(server) -> None:
    assert server.service.workers.restarts == server.service.decoders.restarts == 0
    assert server.service.house.taken == server.service.workers.waiting == 0
    assert server.post("/v1/caption", json=in_json(PICTURES[:1])).status_code == 200


def test_hundreds_of_odd_bodies(server):
    statuses = server.run(ask_all(server, 400, seed=0))
    assert statuses[200] > 5 and statuses[415] > 50 and statuses[400] > 20 and statuses[422] > 20
    check_unharmed(server)


@pytest.mark.slow
def test_ten_thousand_odd_bodies(server):
    """After the first thousand, the memory of no process grows."""

    async def check() -> tuple[dict[str, float], dict[str, float]]:
        await ask_all(server, 1000, seed=1)
        before = memory(server)
        await ask_all(server, 10_000, seed=2)
        return before, memory(server)

    before, after = server.start(check()).result(3000)
    assert before.keys() == after.keys()
    assert all(after[pid] < before[pid] + 60 for pid in before), (before, after)
    check_unharmed(server)


def thoroughly(examples: int):
    """Settings for many examples, the same every time."""
    return hypothesis_settings(max_examples=examples, deadline=None, derandomize=True,
                               suppress_health_check=list(HealthCheck))


VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(),
    lambda inner: (strategies.lists(inner, max_size=4)
                   | strategies.dictionaries(strategies.text(), inner, max_size=4)),
    max_leaves=8)
NAMES = strategies.sampled_from(["images", "image", "num", "prompt", "texts", "question",
                                 "text", "word", "k"])
IMAGES = strategies.lists(strategies.fixed_dictionaries(
    {}, optional={"base64": strategies.text() | strategies.just(base64.b64encode(PICTURES[0]).decode()),
                  "url": strategies.text() | strategies.just("http://pictures.example/")}), max_size=3)


@given(strategies.sampled_from(PATHS), strategies.dictionaries(NAMES | strategies.text(), VALUES, max_size=4),
       strategies.none() | IMAGES)
@thoroughly(150)
def test_any_json(server, path, fields, images):
    content = fields if images is None else {**fields, "images": images}
    assert server.run(ask(server, path, JSON, json.dumps(content).encode())) < 500


@given(strategies.sampled_from(PATHS), strategies.sampled_from(TYPES), strategies.binary(max_size=300))
@thoroughly(100)
def test_any_bytes(server, path, kind, body):
    assert 400 <= server.run(ask(server, path, kind, body)) < 500


@given(strategies.lists(strategies.tuples(strategies.binary(max_size=60), strategies.binary(max_size=60)),
                        max_size=4))
@thoroughly(100)
def test_any_form(server, parts):
    assert 400 <= server.run(ask(server, "/v1/caption", MULTIPART, form(*parts))) < 500
