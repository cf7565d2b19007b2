"""The server on Ray Serve: replicas answer as the server does."""

import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("ray.serve", reason="no Ray Serve: pip install 'ray[serve]'")

import httpx
import ray  # pyright: ignore[reportMissingImports]
import yaml
from ray import serve  # pyright: ignore[reportMissingImports]
from serving import PATIENCE, files, photos, until, write_model

from blip_fast.commands.on_ray import build
from blip_fast.media.images import load_image
from blip_fast.tasks.captioner import Captioner

KEY = "a key for tests"


def test_the_file_fits(monkeypatch):
    """deploy/ray_serve.yaml is valid, and refused without a key."""
    path = Path(__file__).parents[2] / "deploy" / "ray_serve.yaml"
    (application,) = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    monkeypatch.delenv("BLIP_FAST_API_KEY", raising=False)
    with pytest.raises(ValueError, match="BLIP_FAST_API_KEY"):
        build(application["args"])
    monkeypatch.setenv("BLIP_FAST_API_KEY", KEY)
    build(application["args"])


def test_a_replica_is_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP_FAST_API_KEY", KEY)
    model, pictures = write_model(tmp_path / "model", "tied"), photos(4)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"serve": ["--model", model, "--decoders", 1]}))
        url, key = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {KEY}"}
        until(lambda: httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200)
        assert httpx.post(f"{url}/v1/caption", files=files(pictures), timeout=PATIENCE).status_code == 401
        told = httpx.post(f"{url}/v1/caption", files=files(pictures), headers=key, timeout=PATIENCE).json()
        captioner = Captioner.from_pretrained(model, dtype="float32")
        expected = [caption.caption for caption in captioner([load_image(content) for content in pictures])]
        assert [row["captions"][0]["text"] for row in told["results"]] == expected
    finally:
        serve.shutdown()
        ray.shutdown()
