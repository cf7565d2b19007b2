"""How a server is set up: what it takes, who may ask, and what its workers load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """What a request may bring and take. Raises ValueError where one is not positive."""

    upload_bytes: int = 20_000_000  # of a whole body
    pixels: int = 40_000_000  # of a picture, as its header says
    images: int = 16  # of a request
    texts: int = 64  # of a request, that one picture is scored with
    text_characters: int = 500  # of each text
    captions: int = 3  # alternatives of a picture: as many as there are beams, and 5 at most
    queue: int = 128  # pictures and questions that are in the house together; what comes beyond is sent away
    seconds: float = 60.0  # that a request may take, its upload included
    decode_seconds: float = 10.0  # that opening a picture may take

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: a limit must be greater than 0")


@dataclass(frozen=True)
class Settings:
    """A server's. `devices` has a worker each; several may share a device."""

    worker: dict[str, Any]  # keyword arguments of `WorkerOptions`, apart from the device
    devices: tuple[str | None, ...] = (None,)
    limits: Limits = Limits()
    api_key: str | None = None
    host_names: tuple[str, ...] = LOOPBACK  # by which requests may name the server; () for any
    url_hosts: tuple[str, ...] = ()  # from which pictures may be fetched
    decoders: int = 2  # processes that open pictures
