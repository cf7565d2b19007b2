"""Writes the files of a checkpoint, at once or in a thread while training continues."""

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
    """Writes this rank's files of one checkpoint after another.

    In the background, `put` copies to host memory, in the form of the file, and `finish` starts the thread.
    At once, `put` writes. Either way all files are on the disk before the checkpoint becomes the latest.

    Args:
        engine: DeepSpeed's engine, whose own files this writer then writes too.
        background: write in a thread.
    """

    def __init__(self, engine: Any, background: bool) -> None:
        engine.checkpoint_engine.save = self.put
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        # A group for the thread: in the common one its barrier would collide with the step's collectives.
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

    def finish(self, explaining: Callable[[], AbstractContextManager[None]],
               latest: Callable[[], None]) -> None:
        """Write the files within `explaining`, which wraps errors; when all ranks
        have, rank 0 calls `latest`."""
        files, self._files = self._files, []
        if self._thread is None:
            self._write(files, explaining, latest)
        else:
            self._writing = self._thread.submit(self._write, files, explaining, latest)

    def wait(self) -> None:
        """Wait until what was put is written. Raises the thread's error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def check(self) -> None:
        """Raise the error of a thread that has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self, files: list[tuple[Path, io.BytesIO]],
               explaining: Callable[[], AbstractContextManager[None]], latest: Callable[[], None]) -> None:
        with explaining():
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
