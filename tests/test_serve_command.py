"""`blip-fast serve`: what it refuses before it listens, and a server of its own: drain, kill, time, load."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("uvicorn")

import httpx
from serving import files, photos, settings_of, write_model

from blip_fast.serve.settings import LOOPBACK, Limits

ROOT = Path(__file__).parents[1]
COMMAND = ("from blip_fast.cli import _run; from blip_fast.commands.serve import COMMAND; import sys; "
           "sys.exit(_run('serve', COMMAND, sys.argv[1:]))")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "model", "tied")


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "nothing to serve"), (["--model", "m", "--host", "0.0.0.0"], "lets the network in"),
    (["--model", "m", "--api-key", "short"], "8 characters"),
    (["--model", "m", "--api-key", "schlüssel-lang"], "ASCII"),
    (["--model", "m", "--workers", "0"], "at least 1"), (["--model", "m", "--seconds", "0"], "greater than 0"),
    (["--model", "m", "--max-pixels", "900000000"], "at most"), (["--model", "m", "--beams", "0"], "beams"),
    (["--model", "m", "--max-length", "1"], "max_length")])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(arguments, says, monkeypatch):
    monkeypatch.delenv("BLIP_FAST_API_KEY", raising=False)
    with pytest.raises(ValueError, match=says):
        settings_of(*arguments)


def test_who_may_ask(monkeypatch):
    """Without a key only this machine, by its own names; with one, or where anyone is allowed, by any name."""
    monkeypatch.delenv("BLIP_FAST_API_KEY", raising=False)
    assert settings_of("--model", "m").host_names == LOOPBACK
    assert settings_of("--model", "m", "--host", "0.0.0.0", "--allow-anyone").host_names == ()
    monkeypatch.setenv("BLIP_FAST_API_KEY", "from the environment")
    kept = settings_of("--model", "m", "--host", "0.0.0.0")
    assert kept.api_key == "from the environment" and kept.host_names == ()
    assert settings_of("--model", "m", "--api-key", "of the command").api_key == "of the command"


def test_devices_and_workers():
    assert settings_of("--model", "m").devices == (None,)
    assert settings_of("--model", "m", "--devices", "cuda:0, cuda:1").devices == ("cuda:0", "cuda:1")
    assert settings_of("--model", "m", "--devices", "cuda:0,cuda:1", "--workers", 3).devices == (
        "cuda:0", "cuda:1", "cuda:0")
    assert settings_of("--model", "m", "--workers", 2).devices == (None, None)
    assert settings_of("--model", "m", "--beams", 8).limits.captions == 5
    assert settings_of("--model", "m").limits == Limits()


class Served:
    """A server in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "--port", "0", *map(str, arguments)], stderr=subprocess.PIPE, text=True,
            cwd=ROOT)
        self.log: list[str] = []
        self.url: str | None = None
        self._heard = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening at (http://\S+)/", line):
                self.url = found[1]
                self._heard.set()
        self._heard.set()

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/ready").status_code == 200

    def wait(self) -> str:
        self._heard.wait(120)
        assert self.url is not None, self.log
        until(self.ready)
        return self.url

    def caption(self, content: bytes, **options) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/caption", files=files([content]), timeout=120, **options)

    def children(self) -> dict[str, list[int]]:
        """Process numbers by kind: what loaded the model took longest to start and is known by its memory of it."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        spawned = [int(pid) for pid in task if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return {"all": spawned}


def until(holds, seconds=120):
    ends = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < ends
        time.sleep(0.1)


@contextmanager
def served(*arguments: object):
    server = Served(*arguments)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    server = Served("--model", tmp_path)
    assert server.process.wait(120) == 2
    until(lambda: server.log and server.log[-1].startswith("blip-fast: ") and str(tmp_path) in server.log[-1])


def test_a_taken_address_is_said(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = subprocess.run([sys.executable, "-c", COMMAND, "--model", str(model), "--port",
                              str(taken.getsockname()[1])], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 2 and "cannot listen at 127.0.0.1" in run.stderr.splitlines()[-1]


def test_a_server_of_its_own(model):
    """Page, captions, a log without what was sent, a lost worker, and the end in order: one server, for it takes
    seconds to start."""
    with served("--model", model, "--batch-size", 2, "--decoders", 1) as server:
        picture = photos(1)[0]
        assert server.caption(picture).status_code == 200
        assert httpx.get(f"{server.url}/secret-path?secret=1", headers={"User-Agent": "secret"}).status_code == 404
        assert httpx.get(server.url, headers={"Host": "evil.example"}).json()["error"]["code"] == "wrong_host"
        check_broken_requests(server)
        check_lost_worker(server, picture)
        check_drain(server, picture)
        assert "POST /v1/caption 200" in "".join(server.log) and "secret" not in "".join(server.log)


def check_broken_requests(server) -> None:
    """What is no HTTP gets a 400, and an upload whose client goes away leaves nothing behind."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as broken:
        broken.sendall(b"NOT HTTP AT ALL\r\n\r\n")
        assert broken.recv(1000).startswith(b"HTTP/1.1 400")
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
                         b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
        whole = httpx.Request("POST", f"{server.url}/v1/caption", files=files(photos(16)))
        with socket.create_connection(("127.0.0.1", port)) as gone:
            lines = [f"{name}: {value}" for name, value in whole.headers.items()]
            gone.sendall("\r\n".join(["POST /v1/caption HTTP/1.1", *lines, "", ""]).encode() + whole.read())
    until(lambda: "blip_fast_queue_length 0.0" in httpx.get(f"{server.url}/metrics").text, 20)
    assert 'status="499"' in httpx.get(f"{server.url}/metrics").text
    large = http.client.HTTPConnection("127.0.0.1", port)
    large.request("POST", "/v1/caption", bytes(21_000_000), {"Content-Type": "application/json"})
    answer = large.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "too_large"


def check_lost_worker(server, picture: bytes) -> None:
    """Killed under load: what it held is answered with 503, none waits long, and another one captions."""
    statuses, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(server.caption(picture).status_code)
            if statuses[-1] != 200:
                time.sleep(0.05)

    with ThreadPoolExecutor(8) as clients:
        asking = [clients.submit(ask) for _ in range(8)]
        until(lambda: statuses.count(200) > 20)
        for pid in server.children()["all"]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: 503 in statuses, 30)
        before = len(statuses)
        until(lambda: 200 in statuses[before:])
        stop.set()
        for asked in asking:
            asked.result(60)
    assert set(statuses) <= {200, 415, 503}  # the decoder was killed too, and says so of the picture it held
    until(server.ready)


def check_drain(server, picture: bytes) -> None:
    """On SIGTERM what has begun is finished and nothing new begins."""
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(httpx.post, f"{server.url}/v1/caption", files=files([picture] * 16), timeout=120)
                 for _ in range(4)]
        until(lambda: "blip_fast_queue_length 0.0" not in httpx.get(f"{server.url}/metrics").text, 20)
        server.process.send_signal(signal.SIGTERM)
        answers = [each.result(120) for each in asked]
    assert all(answer.status_code in (200, 503) for answer in answers) and any(
        answer.status_code == 200 for answer in answers)
    for answer in answers:
        if answer.status_code == 200:
            assert len(answer.json()["results"]) == 16
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
