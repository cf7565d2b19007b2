"""The process with the model: jobs enter the continuous batch, or are done, as they come."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from typing import Any

from blip_fast.inference import PACKED_TOGETHER
from blip_fast.serve.engine import Engine, WorkerOptions
from blip_fast.serve.messages import Message, receive, send
from blip_fast.serve.processes import ends_with_the_server
from blip_fast.serve.refusals import Refused, internal

BEAT = 0.5  # seconds between two signs of life at least

_log = logging.getLogger("blip_fast.serve")


def main(sock: socket.socket, options: WorkerOptions) -> None:
    """Load what the options name, then work until the server goes."""
    ends_with_the_server()
    try:
        engine = Engine(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        send(sock, {"failed": " ".join(str(error).split())})
        return
    send(sock, {"ready": engine.about})
    Worker(sock, engine).run()


class Worker:
    """The loop of one process. A thread takes jobs from the socket, so that the server can always send."""

    def __init__(self, sock: socket.socket, engine: Engine) -> None:
        self._sock, self._engine = sock, engine
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._captions: deque[Message] = deque()  # wait for the batch
        self._others: deque[Message] = deque()
        self._beaten = 0.0
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def run(self) -> None:
        """A step of all captions, one other job, and again."""
        while True:
            self._take()
            self._begin()
            if self._others:
                self._do(*self._others.popleft())
            for number, result in self._engine.step():
                self._answer(number, result)
            self._beat()

    def _listen(self) -> None:
        while (message := receive(self._sock)) is not None:
            self._inbox.put(message)
        os._exit(0)  # the server has gone

    def _take(self) -> None:
        """What has come meanwhile; with nothing to do, wait."""
        batch = self._engine.batch
        idle = not (self._captions or self._others) and (batch is None or batch.idle)
        while idle or not self._inbox.empty():
            head, blob = self._inbox.get()
            idle = False
            if "cancel" in head:
                self._drop(head["cancel"])
            else:
                (self._captions if head["kind"] == "caption" else self._others).append((head, blob))

    def _drop(self, number: int) -> None:
        """Nobody waits for the job any longer."""
        for waiting in (self._captions, self._others):
            for job in [job for job in waiting if job[0]["id"] == number]:
                waiting.remove(job)
        if self._engine.batch is not None:
            self._engine.batch.leave(number)
        self._answer(number, ({}, b""))

    def _begin(self) -> None:
        """Fill the batch."""
        batch = self._engine.batch
        while self._captions and batch is not None and batch.free:
            some = [self._captions.popleft() for _ in range(min(len(self._captions), batch.free, PACKED_TOGETHER))]
            for number, result in self._guarded(some):
                self._answer(number, result)
            self._beat()

    def _guarded(self, jobs: list[Message]) -> list[tuple[int, Message | Refused]]:
        try:
            return self._engine.enter(jobs)
        except Exception as error:
            return [(head["id"], _failed(error)) for head, _ in jobs]

    def _do(self, head: dict[str, Any], blob: bytes) -> None:
        try:
            result = self._engine.do(head, blob)
        except Refused as refused:
            result = refused
        except Exception as error:
            result = _failed(error)
        self._answer(head["id"], result)

    def _answer(self, number: int, result: Message | Refused) -> None:
        if isinstance(result, Refused):
            send(self._sock, {"id": number, "error": result.told()})
        else:
            send(self._sock, {"id": number, "result": result[0]}, result[1])

    def _beat(self) -> None:
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            send(self._sock, {"beat": 1})


def _failed(error: Exception) -> Refused:
    """What went wrong is for the log, and without its message, which may quote what was sent."""
    traceback, places = error.__traceback__, []
    while traceback is not None:
        places.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    _log.error("%s at %s", type(error).__name__, " < ".join(reversed(places)))
    return internal()
