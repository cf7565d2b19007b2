"""Counts what a rank really allocates and sends: tensors' storages, collectives, and bytes of its sockets."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """A context that records the storages which operations return, and counts in `sent` the bytes that this
    rank sends in collectives, by operation, as if each were a ring."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[tuple[int, int], StorageWeakRef] = {}
        self.sent: Counter[str] = Counter()
        self.peak = self._operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.sent[func.__name__.split(".")[0]] += ring_bytes(func.__name__, args)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                storage = x.untyped_storage()
                self._storages[storage.data_ptr(), storage.nbytes()] = StorageWeakRef(storage)
        self._operations += 1
        if self._operations % 10 == 0:
            self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        """Bytes of the storages that are still allocated."""
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        return sum(nbytes for _, nbytes in self._storages)


def ring_bytes(name: str, args: tuple) -> float:
    """Bytes that one rank sends in a collective of all ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    name = name.split(".")[0]
    if name == "allreduce_":
        return 2 * (ranks - 1) / ranks * sum(x.nbytes for x in args[0])
    if name == "allgather_":
        return (ranks - 1) * sum(x.nbytes for x in args[1])
    if name == "_allgather_base_":
        return (ranks - 1) * args[1].nbytes
    if name == "_reduce_scatter_base_":
        return (ranks - 1) / ranks * args[1].nbytes
    if name == "alltoall_base_":
        x, splits = args[1], args[4]
        return x.nbytes - (splits[rank] * x.element_size() if splits else x.nbytes / ranks)
    assert name in ("barrier", "broadcast_"), f"{name} is not counted yet"
    return 0.0


def socket_bytes() -> int:
    """Bytes that this process's TCP connections have sent, by the kernel's count (Linux's tcp_info)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=socket.dup(int(entry.name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET,
                                                                                   socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:  # closed in the meantime
            continue
    return total
