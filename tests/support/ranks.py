"""Processes that form a gloo group, for tests with several ranks."""

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from blip_train.engine import engine
from blip_train.engine.environment import rank_environment


def spawn(target: Callable[..., None], ranks: int, *args: object) -> None:
    """Run target(rank, ranks, port, *args) in `ranks` processes; `port` is free for their group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(target, (ranks, port, *args), nprocs=ranks)


def join(rank: int, ranks: int, port: int, kept_whole: int = 40) -> torch.device:
    """In a spawned process: become a rank of a run, with one thread, as `engine.start_rank` does. ZeRO 3's
    threshold is so low that nearly everything of a small model is sharded."""
    os.environ.update(rank_environment())
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    engine.KEPT_WHOLE = kept_whole
    return engine.start_rank()
