"""The HTTP process: it listens, serves, and shuts down in order."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from blip_fast.serve.app import make_app
from blip_fast.serve.http.guard import GRACE
from blip_fast.serve.service import Service
from blip_fast.serve.settings import Settings

_log = logging.getLogger("blip_fast.serve")


class Server(uvicorn.Server):
    """On SIGTERM or Ctrl-C it refuses new requests, finishes those that it has, and ends."""

    def __init__(self, service: Service) -> None:
        limits = service.settings.limits
        super().__init__(uvicorn.Config(
            make_app(service), lifespan="on", log_config=None, access_log=False, server_header=False,
            ws="none", proxy_headers=False, timeout_graceful_shutdown=int(limits.seconds + GRACE) + 1))
        self.service = service
        service.on_failure = self._stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.house.draining = True
        super().handle_exit(sig, frame)

    def _stop(self) -> None:
        self.should_exit = True


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until a signal arrives.

    Raises:
        OSError: the address cannot be bound.
        ValueError: a worker cannot load its models.
    """
    service = Service(settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen()  # earlier clients wait in the backlog until the application has started
        except OSError as error:
            raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
        shown = f"[{host}]" if ":" in host else host
        _log.info("listening at http://%s:%d/", shown, listening.getsockname()[1])
        Server(service).run(sockets=[listening])
    if service.failure is not None:
        raise ValueError(service.failure)
