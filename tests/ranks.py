"""Processes that form a gloo group, for tests of what ranks do together."""

import socket
from collections.abc import Callable

import torch.multiprocessing as mp


def spawn(target: Callable[..., None], ranks: int, *args: object) -> None:
    """Run target(rank, ranks, port, *args) in `ranks` processes; `port` is free for their group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(target, (ranks, port, *args), nprocs=ranks)
