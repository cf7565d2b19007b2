"""Work that ranks share comes together as if one had done it, whatever the counts."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from blip_fast.parallel.ranks import ALONE, Ranks, dealt, merged, torchrun_ranks


@given(count=st.integers(0, 40), ranks=st.integers(1, 9))
def test_parts_are_disjoint_and_come_back_in_order(count, ranks):
    items = list(range(count))
    parts = [dealt(items, rank, ranks) for rank in range(ranks)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert merged(parts, count) == items


def test_a_padded_part_is_refused():
    """Five items over two ranks, the second's part filled up with a copy of the first item."""
    with pytest.raises(ValueError, match="rank 1 of 2 has 3 results of its 2 items"):
        merged([[0, 2, 4], [1, 3, 0]], 5)
    with pytest.raises(ValueError, match="rank 0 of 2 has 2 results of its 3 items"):
        merged([[0, 2], [1, 3]], 5)
    with pytest.raises(ValueError, match="rank 0 of 1 has 1 results of its 2 items"):
        ALONE.share(lambda items: items[:1], [1, 2])


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with torchrun_ranks() as ranks:
        assert ranks == ALONE == Ranks(0, 1)
    assert ALONE.share(lambda items: [2 * item for item in items], [1, 2, 3]) == [2, 4, 6]


def rank_of_three(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3",
                      LOCAL_RANK="0")
    with torchrun_ranks() as ranks:
        found = [ranks.share(lambda items: [f"{item} by {rank}" for item in items], range(count))
                 for count in (7, 2, 0)]
        import torch.distributed.nn.functional  # noqa: F401  some package imports it in the middle
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([found,
                                                           [name for name in threads if "gloo" in name]]))


def test_three_processes(tmp_path):
    """Seven items, then fewer items than processes, then none: all processes have all results, and none of
    the group's threads is left, which would abort a process that ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_of_three, (port, str(tmp_path)), nprocs=3)
    for rank in range(3):
        found, threads = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [[f"{item} by {item % 3}" for item in range(count)] for count in (7, 2, 0)]
        assert not threads
