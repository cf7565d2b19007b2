"""The process with the model. Caption jobs enter the continuous batch; others are done between its steps."""

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
from blip_fast.serve.workers.served_models import Result, ServedModels, WorkerOptions

BEAT = 0.5  # at least so many seconds between two signs of life

_log = logging.getLogger("blip_fast.serve")


def main(sock: socket.socket, options: WorkerOptions) -> None:
    """Load the models, then work until the server ends."""
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
    """The main loop of one process. A thread reads from the socket, so the server never blocks on sending."""

    def __init__(self, sock: socket.socket, engine: ServedModels) -> None:
        self._sock, self._engine = sock, engine
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._captions: deque[Message] = deque()  # waiting for room in the batch
        self._others: deque[Message] = deque()
        self._last_beat = 0.0
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def run(self) -> None:
        """Repeat forever: start captions, do a few other jobs, and step all captions by one token."""
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
        """Take the jobs that have arrived. If there is nothing else to do, wait for one."""
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
        """Give up a cancelled job, and acknowledge it with an empty answer."""
        for waiting in (self._captions, self._others):
            for job in [job for job in waiting if job[0]["id"] == number]:
                waiting.remove(job)
        if self._engine.batch is not None:
            self._engine.batch.leave(number)
        self._answer(number, ({}, b""))

    def _begin(self) -> None:
        """Move waiting captions into the free places of the batch."""
        batch = self._engine.batch
        while self._captions and batch is not None and batch.free:
            count = min(len(self._captions), batch.free, batch.together)
            some = [self._captions.popleft() for _ in range(count)]
            self._answer_all(some, self._engine.enter)
            self._beat()

    def _next_others(self) -> list[Message]:
        """The job that has waited longest, and others of its kind that are computed together with it."""
        kind = self._others[0][0]["kind"]
        some = list(islice((job for job in self._others if job[0]["kind"] == kind),
                           self._engine.together(kind)))
        for job in some:
            self._others.remove(job)
        return some

    def _answer_all(self, jobs: list[Message], work: Callable[[list[Message]], list[Result]]) -> None:
        """Do the jobs by `work` and send the results."""
        try:
            results = work(jobs)
        except Exception as error:
            results = [(head["id"], _log_failure(error)) for head, _ in jobs]
        for number, result in results:
            self._answer(number, result)

    def _answer(self, number: int, result: Message | Refused) -> None:
        if isinstance(result, Refused):
            send(self._sock, {"id": number, "error": result.told()})
        else:
            send(self._sock, {"id": number, "result": result[0]}, result[1])

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat > BEAT:
            self._last_beat = time.monotonic()
            send(self._sock, {"beat": 1})


def _log_failure(error: Exception) -> Refused:
    """Log where an error happened, and return the client's refusal. The error's message may quote what was
    sent, so it appears in neither."""
    traceback, places = error.__traceback__, []
    while traceback is not None:
        places.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    _log.error("%s at %s", type(error).__name__, " < ".join(reversed(places)))
    return internal()
