"""Writes the files of a checkpoint, at once or in a thread while the run goes on."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blip_train.collectives import world


class Writer:
    """What a rank writes of its checkpoints, one after another.

    In the background, `put` copies to host memory, in the form that the file will have, and `finish` starts the thread;
    at once, they write. Either way a file has reached the disk before the checkpoint becomes the latest.

    Args:
        engine: DeepSpeed's, whose own files then come this way too.
        background: write in a thread.
    """

    def __init__(self, engine: Any, background: bool) -> None:
        engine.checkpoint_engine.save = self.put
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        # The thread's own: on the ranks' common one its barrier would meet the step's collectives.
        self._group: Any = dist.new_group(backend="gloo") if background else None
        self._files: list[tuple[Path, io.BytesIO]] = []
        self._writing: Future[None] | None = None

    def put(self, state_dict: Any, path: str | Path) -> None:
        """Write what `torch.save` makes of `state_dict`. DeepSpeed passes the arguments by these names."""
        if self._thread is None:
            with Path(path).open("wb") as file:
                torch.save(state_dict, file)
                _to_disk(file)
            return
        copy = io.BytesIO()
        torch.save(state_dict, copy)
        self._files.append((Path(path), copy))

    def finish(self, saying: Callable[[], AbstractContextManager[None]], latest: Callable[[], None]) -> None:
        """When all ranks have written their files, `saying` around what may fail, rank 0 calls `latest`."""
        files, self._files = self._files, []
        if self._thread is None:
            self._write(files, saying, latest)
        else:
            self._writing = self._thread.submit(self._write, files, saying, latest)

    def wait(self) -> None:
        """Until what was put is written. Raises what kept it from being."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def check(self) -> None:
        """Raise what kept a thread that has ended from writing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self, files: list[tuple[Path, io.BytesIO]], saying: Callable[[], AbstractContextManager[None]],
               latest: Callable[[], None]) -> None:
        with saying():
            for path, copy in files:
                with path.open("wb") as file:
                    file.write(copy.getbuffer())
                    _to_disk(file)
        dist.barrier(self._group)
        if world()[0] == 0:
            latest()


def _to_disk(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
