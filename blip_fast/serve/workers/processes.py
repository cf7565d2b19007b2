"""Crews of child processes: jobs are distributed among them, and processes that die or hang are replaced.

A crew's processes run the same function, which takes jobs from a socket and answers them (`messages.py`):

    to the process:    {"id": 7, …} and bytes                    a job
                       {"cancel": 7}                             nobody waits for job 7 any more
    from the process:  {"ready": {…}}                            it takes jobs from now on
                       {"failed": "sentence"}                    it cannot start
                       {"beat": 1}                               a sign of life
                       {"id": 7, "result": …} and bytes          the answer to job 7,
                       {"id": 7, "error": …}                     or its refusal
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from blip_fast.serve.refusals import Refused, not_ready
from blip_fast.serve.workers.messages import Message, packed, read

STEADY = 60.0  # a process that lived longer (seconds) is restarted at once
# Seconds before other restarts: doubled after each failure, up to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
READ_AHEAD = 1 << 20  # bytes of the socket reader's buffer
LOOK = 0.25  # at most so many seconds between two checks for hung processes

_SPAWN = multiprocessing.get_context("spawn")
_log = logging.getLogger("blip_fast.serve")


def ends_with_the_server() -> None:
    """In a crew's process: ignore signals, since the server decides when it ends; end if the server dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and systemd send them to every process
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, name="parent", daemon=True).start()


@dataclass(eq=False)
class _Job:
    number: int
    head: dict[str, Any]
    blob: bytes
    done: asyncio.Future[Message]
    by: _Member | None = None


@dataclass(eq=False)
class _Member:
    """One place in a crew. Its process may be replaced several times."""

    arguments: Sequence[Any]
    process: Any = None
    writer: asyncio.StreamWriter | None = None
    ready: dict[str, Any] | None = None  # the content of its "ready" message
    heard: float = 0.0  # when its last message came
    jobs: dict[int, _Job] = field(default_factory=dict)  # not answered yet


class Crew:
    """Processes of one kind."""

    def __init__(self, name: str, main: Callable[..., None], members: Sequence[Sequence[Any]], *, depth: int,
                 patience: float, lost: Callable[[], Refused], failed: Callable[[str], None]) -> None:
        """
        Args:
            name: in logs and metrics.
            main: what a process runs: `main(socket, *arguments)`. Function and arguments are pickled.
            members: the arguments of each process.
            depth: jobs that a process may hold at a time.
            patience: a process that holds jobs and sends nothing for so many seconds is killed.
            lost: makes the refusal for the jobs of a process that ended.
            failed: called with the sentence of a process that cannot start, if none has ever been ready.
        """
        self.name, self.restarts = name, 0
        self._main, self._depth, self._patience = main, depth, patience
        self._lost, self._on_failed = lost, failed
        self._members = [_Member(arguments) for arguments in members]
        self._waiting: dict[int, _Job] = {}
        self._numbers = count()
        self._keepers: list[asyncio.Task[None]] = []
        self.info: dict[str, Any] | None = None  # the content of the first "ready" message

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        """The number of processes that take jobs."""
        return sum(member.ready is not None for member in self._members)

    @property
    def waiting(self) -> int:
        """The number of jobs that no process has taken yet."""
        return len(self._waiting)

    @property
    def pids(self) -> list[int]:
        """The ids of the current processes."""
        return [member.process.pid for member in self._members if member.process is not None]

    def start(self) -> None:
        """Start all processes and keep them running. Needs a running event loop."""
        self._keepers = [asyncio.create_task(self._keep(member)) for member in self._members]

    async def stop(self) -> None:
        """End all processes at once. Unfinished jobs are lost."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for job in self._waiting.values():
            _fail(job, self._lost())

    async def do(self, head: dict[str, Any], blob: bytes = b"") -> Message:
        """The result of a job, and the bytes that come with it. Cancelling this call cancels the job.

        Raises Refused: the process refuses the job; the process was lost; no process is ready.
        """
        if not self.ready:
            raise not_ready()
        job = _Job(next(self._numbers), head, blob, asyncio.get_running_loop().create_future())
        self._waiting[job.number] = job
        self._hand_out()
        try:
            answer, blob = await job.done
        finally:
            self._waiting.pop(job.number, None)
            if job.by is not None and job.number in job.by.jobs and job.by.writer is not None:
                job.by.writer.write(packed({"cancel": job.number}))
        if "error" in answer:
            raise Refused.of(answer["error"])
        return answer["result"], blob

    def _hand_out(self) -> None:
        while self._waiting:
            free = [member for member in self._members if member.ready is not None
                    and len(member.jobs) < self._depth]
            if not free:
                return
            member = min(free, key=lambda member: len(member.jobs))
            job = self._waiting.pop(next(iter(self._waiting)))
            if not member.jobs:
                member.heard = asyncio.get_running_loop().time()
            job.by = member
            member.jobs[job.number] = job
            assert member.writer is not None
            member.writer.write(packed({"id": job.number, **job.head}, job.blob))

    async def _keep(self, member: _Member) -> None:
        """Start the member's process whenever there is none."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            began = loop.time()
            try:
                await self._live(member)
            except Exception as error:  # the process cannot be started, or it sent an unreadable message
                _log.error("a process of the %s is given up: %s", self.name, type(error).__name__)
            finally:
                self._bury(member)
            failures = 0 if loop.time() - began > STEADY else failures + 1
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) if failures else 0.0
            self.restarts += 1
            _log.warning("a process of the %s ended with status %s: another one is started in %.1f s",
                         self.name, member.process.exitcode if member.process is not None
                         else "unknown", wait)
            await asyncio.sleep(wait)

    async def _live(self, member: _Member) -> None:
        """Run one process from its start to its end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        member.process = _SPAWN.Process(target=self._main, args=(theirs, *member.arguments), daemon=True,
                                        name=f"blip-fast {self.name}")
        try:
            await asyncio.to_thread(member.process.start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, member.writer = await asyncio.open_connection(sock=ours, limit=READ_AHEAD)
        watch = asyncio.create_task(self._watch(member))
        try:
            while (message := await read(reader)) is not None:
                self._handle(member, *message)
        finally:
            watch.cancel()

    async def _watch(self, member: _Member) -> None:
        """Kill the member's process when it holds jobs and sends nothing."""
        loop = asyncio.get_running_loop()
        while not member.jobs or loop.time() - member.heard < self._patience:
            await asyncio.sleep(min(LOOK, self._patience / 4))
        _log.error("a process of the %s said nothing for %.1f s and is killed", self.name, self._patience)
        member.process.kill()

    def _handle(self, member: _Member, head: dict[str, Any], blob: bytes) -> None:
        """Handle a message of the member's process."""
        member.heard = asyncio.get_running_loop().time()
        if "ready" in head:
            member.ready = head["ready"]
            self.info = self.info or member.ready
        elif "failed" in head:
            _log.error("a process of the %s cannot begin", self.name)
            if self.info is None:
                self._on_failed(head["failed"])
        elif (job := member.jobs.pop(head.get("id", -1), None)) is not None and not job.done.done():
            job.done.set_result((head, blob))
        self._hand_out()

    def _bury(self, member: _Member) -> None:
        """Clean up after the member's process, killing it if it still runs."""
        member.ready = None
        if member.writer is not None:
            member.writer.close()
            member.writer = None
        if member.process is not None and member.process.pid is not None:
            with contextlib.suppress(OSError, ValueError):
                member.process.kill()
                member.process.join()
        jobs, member.jobs = list(member.jobs.values()), {}
        for job in jobs:
            _fail(job, self._lost())


def _fail(job: _Job, refused: Refused) -> None:
    if not job.done.done():
        job.done.set_exception(refused)
