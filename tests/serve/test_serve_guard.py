"""The guard around the routes: access, limits of size and time, and the headers of every response."""

import asyncio
import json
import logging
import socket
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

import uvicorn
from patience import PATIENCE

from blip_fast.serve.http import guard
from blip_fast.serve.http.guard import Guard, House
from blip_fast.serve.http.observing import Observing
from blip_fast.serve.settings import Limits, Settings

LIMITS = Limits(upload_bytes=1000, queue=2)
SHORT = Limits(upload_bytes=1000, seconds=0.3)
LOCAL = [(b"host", b"localhost:8000")]


@pytest.fixture(autouse=True)
def short_lingering(monkeypatch):
    monkeypatch.setattr(guard, "LINGER", 1.0)


class Client:
    """An ASGI client that sends a body in parts, perhaps disconnects, and records the response."""

    def __init__(self, parts=(b"",), leaves=False):
        self.messages = [{"type": "http.request", "body": part,
                          "more_body": i < len(parts) - 1 or leaves == "early"}
                         for i, part in enumerate(parts)]
        self.leaves, self.taken, self.started, self.body = leaves, 0, None, b""
        self.taken_before = 0  # when the response began
        self.done = asyncio.Event()

    async def receive(self):
        if self.taken < len(self.messages):
            self.taken += 1
            return self.messages[self.taken - 1]
        if not self.leaves:
            await self.done.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert self.started is None
            self.started, self.taken_before = message, self.taken
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                self.done.set()

    @property
    def status(self):
        return None if self.started is None else self.started["status"]

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.started["headers"]}

    @property
    def code(self):
        return json.loads(self.body)["error"]["code"]


class App:
    """An application that reads the body, waits and answers; it records what happened."""

    def __init__(self, wait=0.0):
        self.wait, self.sizes, self.ends = wait, [], []

    async def __call__(self, scope, receive, send):
        try:
            size, more = 0, True
            while more:
                message = await receive()
                assert message["type"] == "http.request"
                size, more = size + len(message["body"]), message["more_body"]
            self.sizes.append(size)
            await asyncio.sleep(self.wait)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})
            self.ends.append("answered")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise


def guarded(app, limits=LIMITS, **settings):
    house = House(limits)
    settings = Settings({}, limits=limits, **settings)
    return Guard(app, settings, house, Observing([], lambda: house.taken)), house


def scope(method="POST", path="/v1/caption", headers=()):
    return {"type": "http", "method": method, "path": path, "headers": [*LOCAL, *headers]}


async def ask(over, client, **options):
    await asyncio.wait_for(over(scope(**options), client.receive, client.send), PATIENCE)
    return client


def run(coroutine):
    return asyncio.run(coroutine)


def test_every_answer_has_the_headers_of_safety():
    async def check():
        over, _ = guarded(App())
        for client in (await ask(over, Client()), await ask(over, Client([b"x" * 2000])),
                       await ask(over, Client(), method="GET", path="/")):
            policy = client.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in client.headers["content-security-policy"]
            assert client.headers["x-content-type-options"] == "nosniff"
            assert client.headers["referrer-policy"] == "no-referrer"

    run(check())


def test_the_limit_holds_while_the_body_comes_in():
    """Exactly the limit passes; one byte more does not, whether the length was announced or not. After an
    early response the rest is read, so that the client receives the response, but no more than a few times
    the limit."""
    async def check():
        app = App()
        over, house = guarded(app)
        assert (await ask(over, Client([b"x" * 400, b"x" * 600]))).status == 200
        endless = Client([b"x" * 100] * 1000)
        assert (await ask(over, endless)).status == 413 and endless.code == "too_large"
        assert endless.taken_before == 11 and endless.taken == guard.DISCARDED * 10 + 1
        announced = Client([b"x" * 100] * 30)
        await ask(over, announced, headers=[(b"content-length", b"3000")])
        assert announced.status == 413 and announced.headers["connection"] == "close"
        assert announced.taken_before == 0 and announced.taken == 30
        assert app.sizes == [1000] and house.taken == 0

    run(check())


def test_a_full_queue_sends_away():
    async def check():
        app = App(wait=0.1)
        over, house = guarded(app)
        clients = await asyncio.gather(*(ask(over, Client()) for _ in range(5)))
        assert sorted(client.status for client in clients) == [200, 200, 429, 429, 429]
        away = next(client for client in clients if client.status == 429)
        assert away.code == "busy" and away.headers["retry-after"] == "1" and away.taken_before == 0
        assert house.taken == 0 and (await ask(over, Client())).status == 200

    run(check())


def test_who_is_sent_away_hears_it():
    """With sockets: a client that sends a whole large upload before it reads gets the response and is not cut
    off. The server waits a little while for a slow one."""
    limits = Limits(upload_bytes=20_000_000, queue=1)

    async def check():
        app = App()
        over, house = guarded(app, limits)
        async with listening(over) as port:
            with house.seat():
                answers = await asyncio.gather(*(asyncio.to_thread(sends_all, port, 15_000_000)
                                                 for _ in range(4)))
            assert all(answer.startswith(b"HTTP/1.1 429 ") and b'"busy"' in answer for answer in answers)
            assert (await asyncio.to_thread(sends_all, port, 1_000)).startswith(b"HTTP/1.1 200 ")
            assert (await asyncio.to_thread(sends_all, port, 30_000_000)).startswith(b"HTTP/1.1 413 ")
        slow = Client([b"x"], leaves="early")
        slow.receive = asyncio.Event().wait
        with house.seat():
            assert (await ask(over, slow)).status == 429

    run(check())


@asynccontextmanager
async def listening(app):
    """Run an HTTP server. Yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def sends_all(port: int, size: int) -> bytes:
    """The response that a client reads after it has sent its whole body."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                           b"Content-Length: %d\r\n\r\n" % size)
        connection.sendall(bytes(size))
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_request_of_several_pictures_takes_several_seats():
    async def check():
        house = House(LIMITS)
        with house.seat() as seat:
            seat.take(1)
            with pytest.raises(Exception, match="busy"):
                seat.take(1)
            assert house.taken == 2
        assert house.taken == 0

    run(check())


def test_time_is_over():
    """The work is cancelled and the client is told; an endless body does not prolong it."""
    async def check():
        app = App(wait=300)
        over, house = guarded(app, SHORT)
        late = await ask(over, Client())
        assert late.status == 504 and late.code == "timed_out" and app.ends == ["cancelled"]
        slow = Client([b"x"])
        slow.messages[0]["more_body"] = True
        assert (await ask(over, slow)).status == 504
        assert house.taken == 0

    run(check())


def test_a_client_that_goes_away_ends_its_work():
    async def check():
        app = App(wait=300)
        over, house = guarded(app)
        gone = await ask(over, Client(leaves=True))
        assert gone.status is None and app.ends == ["cancelled"] and house.taken == 0
        early = await ask(over, Client(leaves="early"))
        assert early.status is None and app.ends == ["cancelled"] * 2 and house.taken == 0
        counted = over._observing.registry.get_sample_value
        assert counted("blip_fast_requests_total", {"route": "other", "status": "499"}) == 2

    run(check())


def test_keys():
    async def check():
        over, _ = guarded(App(), api_key="secret-key", host_names=())
        for header in (b"", b"Bearer", b"Bearer wrong-key", b"Basic secret-key", b"Bearer secret-key2",
                       b"secret-key", b"Bearer \xff\xfe"):
            client = await ask(over, Client(), headers=[(b"authorization", header)])
            assert client.status == 401 and client.code == "unauthorized" and client.taken_before == 0
            assert client.headers["www-authenticate"] == "Bearer"
        assert (await ask(over, Client(), headers=[(b"authorization", b"bearer secret-key")])).status == 200
        assert (await ask(over, Client(), path="/v1/indexed/1", method="GET")).status == 401
        client = Client()
        await over({**scope(path="/below/v1/caption"), "root_path": "/below"}, client.receive, client.send)
        assert client.status == 401
        for path in ("/", "/v1/info", "/health", "/metrics"):
            assert (await ask(over, Client(), path=path, method="GET")).status == 200

    run(check())


def test_other_sites_and_names_are_kept_out():
    """A page of another site, or a foreign name that resolves to this machine, gets nothing."""
    async def check():
        over, _ = guarded(App())
        for host in (b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"",
                     b"127.0.0.1.evil.example"):
            client = Client()
            await over({"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host)]},
                       client.receive, client.send)
            assert client.status == 403 and client.code == "wrong_host"
        for host in (b"localhost", b"LOCALHOST:80", b"127.0.0.1:8000", b"[::1]:8000"):
            client = Client()
            await over({"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host)]},
                       client.receive, client.send)
            assert client.status == 200
        for site, status in ((b"cross-site", 403), (b"same-site", 403), (b"same-origin", 200),
                             (b"none", 200)):
            assert (await ask(over, Client(), headers=[(b"sec-fetch-site", site)])).status == status

    run(check())


def test_draining_takes_nothing_new():
    async def check():
        app = App(wait=0.1)
        over, house = guarded(app)
        before = asyncio.create_task(ask(over, Client()))
        await asyncio.sleep(0.02)
        house.draining = True
        after = await ask(over, Client())
        assert after.status == 503 and after.code == "draining" and after.headers["retry-after"] == "5"
        assert (await before).status == 200

    run(check())


def test_failures_tell_the_log_no_input(caplog):
    """The log contains no exception message, path or method as the client sent it."""
    async def fail(scope, receive, send):
        raise RuntimeError("secret\nforged line")

    async def check():
        over, _ = guarded(fail)
        client = await ask(over, Client(), path="/secret\nforged", method="SECRET")
        assert client.status == 500 and client.code == "internal"
        assert b"secret" not in client.body

    with caplog.at_level(logging.INFO, "blip_fast.serve"):
        run(check())
    assert "RuntimeError" in caplog.text and "500" in caplog.text
    assert "secret" not in caplog.text.lower() and "forged" not in caplog.text
