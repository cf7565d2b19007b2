"""The functions that processes of test crews run. They must be importable, since processes are spawned."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

from blip_fast.serve.workers.messages import receive, send
from blip_fast.serve.workers.processes import ends_with_the_server


def obedient(sock: socket.socket, folder: str) -> None:
    """A process that does what its jobs say."""
    ends_with_the_server()
    Path(folder, f"{time.monotonic_ns()}.start").touch()
    send(sock, {"ready": {"pid": os.getpid()}})
    while (message := receive(sock)) is not None:
        head, blob = message
        if "cancel" in head:
            Path(folder, f"{head['cancel']}.cancelled").touch()
            continue
        match head.get("order"):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                os.abort()
            case "hang":
                threading.Event().wait(600)
            case "work":  # long work, with signs of life
                for _ in range(10):
                    time.sleep(0.3)
                    send(sock, {"beat": 1})
            case "babble":
                sock.sendall(b"\0\0\0\x02\0\0\0\0]]")
            case "refuse":
                send(sock, {"id": head["id"], "error": {"status": 422, "code": "bad_value",
                                                        "message": "No."}})
                continue
            case "sleep":
                time.sleep(0.3)
        send(sock, {"id": head["id"], "result": {"pid": os.getpid()}}, blob[::-1])


def failing(sock: socket.socket, folder: str) -> None:
    """A process that cannot start, unless the folder allows it."""
    ends_with_the_server()
    Path(folder, f"{time.monotonic_ns()}.start").touch()
    if not Path(folder, "may begin").exists():
        send(sock, {"failed": "there is no such model: name another"})
        return
    obedient(sock, folder)


def dying(sock: socket.socket, folder: str) -> None:
    Path(folder, f"{time.monotonic_ns()}.start").touch()
    os.abort()
