"""Crews of processes: jobs and answers, and processes that die, hang, cannot start, or lose their server."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import serving_crew
from patience import PATIENCE

from blip_fast.serve.refusals import Refused, worker_lost
from blip_fast.serve.workers import processes
from blip_fast.serve.workers.messages import packed
from blip_fast.serve.workers.processes import Crew


@asynccontextmanager
async def crew(folder, count=1, main=serving_crew.obedient, depth=4, patience=600.0, begun=True):
    failures = []
    made = Crew("tests", main, [(str(folder),)] * count, depth=depth, patience=patience, lost=worker_lost,
                failed=failures.append)
    made.failures = failures
    made.start()
    try:
        if begun:
            await until(lambda: made.ready == count)
        yield made
    finally:
        await made.stop()


async def until(holds):
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.01)


def starts(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.start"))


def run(check):
    asyncio.run(asyncio.wait_for(check, PATIENCE))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_jobs_are_shared_out_and_answered(tmp_path):
    async def check():
        async with crew(tmp_path, 2, depth=1) as made:
            answers = await asyncio.gather(*(made.do({"order": "sleep"}, bytes([i, 255])) for i in range(4)))
            assert [blob for _, blob in answers] == [bytes([255, i]) for i in range(4)]
            assert len({head["pid"] for head, _ in answers}) == 2 and made.waiting == 0
            large = bytes(range(256)) * 80_000  # larger than a socket's buffer
            assert (await made.do({}, large))[1] == large[::-1]
            with pytest.raises(Refused, match="bad_value"):
                await made.do({"order": "refuse"})

    run(check())


@pytest.mark.parametrize("order", ["die", "crash", "babble"])
def test_a_process_that_dies_is_replaced(tmp_path, order):
    """Its own jobs are lost, waiting jobs are done by the next process, and nobody waits forever."""
    async def check():
        async with crew(tmp_path, depth=2) as made:
            (first,) = made.pids
            jobs = [asyncio.ensure_future(made.do({"order": order}))] + [
                asyncio.ensure_future(made.do({"order": "sleep"})) for _ in range(3)]
            done = await asyncio.gather(*jobs, return_exceptions=True)
            assert [isinstance(result, Refused) for result in done] == [True, True, False, False]
            assert done[0].code == "worker_lost" and done[0].status == 503
            assert made.pids != [first] and made.restarts == 1 and made.ready == 1 and not alive(first)

    run(check())


def test_without_a_process_jobs_are_refused_at_once(tmp_path):
    async def check():
        async with crew(tmp_path) as made:
            os.kill(made.pids[0], signal.SIGKILL)
            await until(lambda: made.ready == 0)
            with pytest.raises(Refused, match="not_ready"):
                await made.do({})
            await until(lambda: made.ready == 1)
            await made.do({})

    run(check())


def test_a_process_that_hangs_is_replaced_and_one_that_works_is_not(tmp_path):
    async def check():
        async with crew(tmp_path, patience=5.0) as made:
            assert (await made.do({"order": "work"}))[0]["pid"] in made.pids
            with pytest.raises(Refused, match="worker_lost"):
                await made.do({"order": "hang"})
            await until(lambda: made.ready == 1)
            os.kill(made.pids[0], signal.SIGSTOP)
            with pytest.raises(Refused, match="worker_lost"):
                await made.do({})
            await until(lambda: made.ready == 1)
            await asyncio.sleep(6.0)  # a process without jobs may be silent
            assert made.restarts == 2

    run(check())


def test_a_cancelled_job_is_dropped(tmp_path):
    """A waiting job never starts; for a running job, its process is told."""
    async def check():
        async with crew(tmp_path, depth=1) as made:
            first, second = (asyncio.ensure_future(made.do({"order": "sleep"})) for _ in range(2))
            await asyncio.sleep(0)
            assert made.waiting == 1
            second.cancel()
            await asyncio.sleep(0)
            assert made.waiting == 0
            first.cancel()
            assert (await made.do({}, b"ab"))[1] == b"ba"
            assert [path.stem for path in tmp_path.glob("*.cancelled")] == ["0"]

    run(check())


def test_waits_grow_between_deaths(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FIRST_WAIT", 0.4)

    async def check():
        async with crew(tmp_path, main=serving_crew.dying, begun=False) as made:
            await until(lambda: made.restarts == 4)

    run(check())
    times = starts(tmp_path)
    gaps = [(later - earlier) / 1e9 for earlier, later in pairwise(times)]
    assert len(gaps) >= 3 and all(gap > 0.4 * 2**i for i, gap in enumerate(gaps))


def test_one_that_cannot_begin_says_why(tmp_path):
    """At the first start the server is told; later the process is replaced like any other."""
    async def check():
        async with crew(tmp_path, main=serving_crew.failing, begun=False) as made:
            await until(lambda: made.failures)
            assert made.failures[0] == "there is no such model: name another" and made.ready == 0
            (tmp_path / "may begin").touch()
            await until(lambda: made.ready == 1)
            told = len(made.failures)
            (tmp_path / "may begin").unlink()
            os.kill(made.pids[0], signal.SIGKILL)
            count = len(starts(tmp_path))
            await until(lambda: len(starts(tmp_path)) >= count + 2)
            assert len(made.failures) == told

    run(check())


def test_signals_of_a_terminal_end_no_process(tmp_path):
    async def check():
        async with crew(tmp_path) as made:
            (pid,) = made.pids
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
            assert (await made.do({}))[0]["pid"] == pid
        await until(lambda: not alive(pid))  # stopping the crew ends it

    run(check())


def test_no_process_outlives_its_server(tmp_path):
    """Not even a hanging one, when the server is killed."""
    server = subprocess.Popen(
        [sys.executable, "-c", f"""if True:
            import asyncio, sys
            sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
            import test_serve_processes as tests
            async def serve():
                async with tests.crew({str(tmp_path)!r}) as made:
                    asyncio.ensure_future(made.do({{"order": "hang"}}))
                    await asyncio.sleep(0.3)
                    print(made.pids[0], flush=True)
                    await asyncio.sleep(600)
            if __name__ == "__main__":
                asyncio.run(serve())
        """], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    assert alive(pid)
    server.kill()
    server.wait()
    asyncio.run(until(lambda: not alive(pid)))


def test_messages_are_no_pickles():
    """A process that has been taken over can send only JSON and bytes."""
    assert packed({"a": "é"}, b"\x00\xff") == b"\0\0\0\x0f\0\0\0\x02" + b'{"a": "\\u00e9"}' + b"\x00\xff"
