"""`blip-fast serve`: options that it refuses, and a real server that is drained and loses processes."""

import http.client
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
pytest.importorskip("uvicorn")

import httpx
import yaml
from serving import PATIENCE, Served, files, photos, served, settings_of, until, write_model

from blip_fast.serve.settings import LOOPBACK, Limits


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "model", "tied")


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "nothing to serve"), (["--answerer", "m", "--explain"], "matches texts"),
    (["--model", "m", "--host", "0.0.0.0"], "lets the network in"),
    (["--model", "m", "--api-key", "short"], "8 characters"),
    (["--model", "m", "--api-key", "schlüssel-lang"], "ASCII"),
    (["--model", "m", "--workers", "0"], "at least 1"),
    (["--model", "m", "--seconds", "0"], "greater than 0"),
    (["--model", "m", "--max-pixels", "900000000"], "at most"), (["--model", "m", "--beams", "0"], "beams"),
    (["--model", "m", "--max-length", "1"], "max_length"), (["--model", "m", "--queue", "15"], "no room")])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(arguments, says, monkeypatch):
    monkeypatch.delenv("BLIP_FAST_API_KEY", raising=False)
    with pytest.raises(ValueError, match=says):
        settings_of(*arguments)


def test_who_may_ask(monkeypatch):
    """Without a key, only this machine by its own names; with a key or --allow-anyone, under any name."""
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


def test_containers_and_units_start_it_as_it_is_started(monkeypatch):
    """Dockerfile, compose.yaml and the systemd unit use existing options."""
    monkeypatch.setenv("BLIP_FAST_API_KEY", "of the environment")
    root = Path(__file__).parents[2]
    docker = (root / "Dockerfile").read_text(encoding="utf-8")
    begin, usual = (json.loads(*re.findall(rf"^{name} (.*)", docker, re.M)) for name in ("ENTRYPOINT", "CMD"))
    services = yaml.safe_load((root / "compose.yaml").read_text(encoding="utf-8"))["services"]
    unit = shlex.split(*re.findall("^ExecStart=(.*)", (root / "deploy/blip-fast.service").read_text("utf-8"),
                                   re.M))
    for command in (begin + usual, *(begin + service["command"] for service in services.values()), unit):
        assert Path(command[0]).name == "blip-fast" and command[1] == "serve"
        assert settings_of(*command[2:]).worker["model"]
    assert sorted(services) == ["cpu", "cuda"]


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    server = Served("--model", tmp_path)
    assert server.ended() == 2
    assert server.log[-1].startswith("blip-fast: ") and str(tmp_path) in server.log[-1]


def test_a_taken_address_is_said(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Served("--model", model, "--port", taken.getsockname()[1])
        assert server.ended() == 2 and "cannot listen at 127.0.0.1" in server.log[-1]


def test_a_server_of_its_own(model):
    """Captions, a log without clients' input, a lost worker, and an orderly end, all with one server, since
    it takes seconds to start."""
    with served("--model", model, "--batch-size", 2, "--decoders", 1, "--seconds", PATIENCE) as server:
        assert server.caption(photos(1)).status_code == 200
        assert server.get("/secret-path?secret=1", headers={"User-Agent": "secret"}).status_code == 404
        assert server.get("/", headers={"Host": "evil.example"}).json()["error"]["code"] == "wrong_host"
        for path in ("/", "/ready"):  # as load balancers do
            head, whole = httpx.head(f"{server.url}{path}"), server.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(whole.content))
        check_broken_requests(server)
        check_lost_processes(server)
        check_drain(server)
        assert "POST /v1/caption 200" in "".join(server.log) and "secret" not in "".join(server.log)


def check_broken_requests(server: Served) -> None:
    """Anything but HTTP gets a 400, and an upload whose client disconnects leaves nothing behind."""
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as broken:
        broken.sendall(b"NOT HTTP AT ALL\r\n\r\n")
        assert broken.recv(1000).startswith(b"HTTP/1.1 400")
    whole = httpx.Request("POST", address.join("/v1/caption"), files=files(photos(16)))
    head = "\r\n".join(["POST /v1/caption HTTP/1.1",
                        *(f"{name}: {value}" for name, value in whole.headers.items()), "", ""]).encode()
    for sent in (head, head + whole.read()[:1000], head + whole.read()) * 5:
        with socket.create_connection((address.host, address.port)) as gone:
            gone.sendall(sent)
    until(lambda: 'route="/v1/caption",status="499"' in server.get("/metrics").text)
    until(lambda: "blip_fast_queue_length 0.0" in server.get("/metrics").text)
    large = http.client.HTTPConnection(address.host, address.port)
    large.request("POST", "/v1/caption", bytes(21_000_000), {"Content-Type": "application/json"})
    answer = large.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "too_large"


def check_lost_processes(server: Served) -> None:
    """Killed under load: their jobs are refused, no request waits forever, and other processes take over."""
    told, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = server.caption(photos(1)).json()
            told.append(answer["error"]["code"] if "error" in answer else "captioned")
            if told[-1] != "captioned":
                time.sleep(0.05)

    with ThreadPoolExecutor(8) as clients:
        asking = [clients.submit(ask) for _ in range(8)]
        until(lambda: told.count("captioned") > 20)
        for pid in server.crews():
            os.kill(pid, signal.SIGKILL)
        until(lambda: "worker_lost" in told)
        before = len(told)
        until(lambda: "captioned" in told[before:])
        stop.set()
        for asked in asking:
            asked.result(PATIENCE)
    # A decoder was killed too; this is the refusal of the picture that it held.
    assert set(told) <= {"captioned", "worker_lost", "not_ready", "not_an_image"}
    until(server.ready)


def check_drain(server: Served) -> None:
    """On SIGTERM, running requests are finished and new ones refused."""
    def refused() -> bool:
        try:
            return server.caption(photos(1)).status_code == 503
        except httpx.TransportError:  # it no longer listens
            return True

    with httpx.stream("POST", f"{server.url}/v1/caption", files=files(photos(16)), timeout=PATIENCE,
                      headers={"Accept": "application/x-ndjson"}) as answer:
        lines = answer.iter_lines()
        rows = [next(lines)]
        server.process.send_signal(signal.SIGTERM)
        until(refused)
        rows.extend(lines)
    assert len(rows) == 16 and all("captions" in json.loads(row) for row in rows)
    assert server.ended() == -signal.SIGTERM
