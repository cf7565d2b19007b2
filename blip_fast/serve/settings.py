"""A server's settings: limits, access, and what its workers load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """Limits of a request. Raises ValueError if one is not positive."""

    upload_bytes: int = 20_000_000  # of the whole body
    pixels: int = 40_000_000  # of a picture, according to its header
    images: int = 16  # per request
    texts: int = 64  # per request, to score one picture with
    text_characters: int = 500  # of each text
    captions: int = 3  # alternatives per picture: at most the number of beams, and at most 5
    queue: int = 128  # pictures and questions in the server at once; more are refused with 429
    seconds: float = 60.0  # per request, upload included
    decode_seconds: float = 10.0  # to open one picture

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: a limit must be greater than 0")


@dataclass(frozen=True)
class Settings:
    """The settings of a server. Each entry of `devices` gets a worker, and entries may repeat."""

    worker: dict[str, Any]  # keyword arguments of `WorkerOptions`, except the device
    devices: tuple[str | None, ...] = (None,)
    limits: Limits = Limits()
    api_key: str | None = None
    host_names: tuple[str, ...] = LOOPBACK  # accepted in the Host header; () accepts any
    url_hosts: tuple[str, ...] = ()  # hosts that pictures may be fetched from
    decoders: int = 2  # number of processes that open pictures
