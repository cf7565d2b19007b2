"""The process with the model: jobs enter the continuous batch, or are done, as they come."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from blip_fast.inference.precision import say
from blip_fast.serve.refusals import Refused, internal
from blip_fast.serve.workers.messages import Message, receive, send
from blip_fast.serve.workers.processes import ends_with_the_server
from blip_fast.serve.workers.served_models import ServedModels, Result, WorkerOptions

BEAT = 0.5  # seconds between two signs of life at least

_log = logging.getLogger("blip_fast.serve")


def main(sock: socket.socket, options: WorkerOptions) -> None:
    """Load what the options name, then work until the server goes."""
    ends_with_the_server()
    try:
        engine = ServedModels(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        send(sock, {"failed": " ".join(str(error).split())})
        return
    say(engine.precision)
    send(sock, {"ready": engine.about})
    Worker(sock, engine).run()


class Worker:
    """The loop of one process. A thread takes jobs from the socket, so that the server can always send."""

    def __init__(self, sock: socket.socket, engine: ServedModels) -> None:
        self._sock, self._engine = sock, engine
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._captions: deque[Message] = deque()  # wait for the batch
        self._others: deque[Message] = deque()
        self._beaten = 0.0
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def run(self) -> None:
        """A step of all captions, a few other jobs, and again."""
        while True:
            self._take()
            self._begin()
            if self._others:
                self._answer_all(self._next_others(), self._engine.do)
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
            count = min(len(self._captions), batch.free, batch.together)
            some = [self._captions.popleft() for _ in range(count)]
            self._answer_all(some, self._engine.enter)
            self._beat()

    def _next_others(self) -> list[Message]:
        """The job that has waited longest, and of those of its kind as many as are done with it."""
        kind = self._others[0][0]["kind"]
        some = list(islice((job for job in self._others if job[0]["kind"] == kind), self._engine.together(kind)))
        for job in some:
            self._others.remove(job)
        return some

    def _answer_all(self, jobs: list[Message], work: Callable[[list[Message]], list[Result]]) -> None:
        """Answer with what `work` makes of the jobs."""
        try:
            results = work(jobs)
        except Exception as error:
            results = [(head["id"], _failed(error)) for head, _ in jobs]
        for number, result in results:
            self._answer(number, result)

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
