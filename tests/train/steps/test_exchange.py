"""Rows fetched from other ranks: the same rows and gradients as gathering
everything, and only the needed bytes."""

import os

import pytest
import torch
import torch.distributed as dist
from blip_train.steps.exchange import Exchange, gathered_bytes
from ranks import spawn

from blip_fast.model.packed_texts import PackedTexts

ROWS, TOKENS, WIDTH = 16, 5, 32


def images(rank: int) -> torch.Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))


def texts(rank: int) -> PackedTexts:
    return PackedTexts.from_lists([[rank, row, *range(row % 4)] for row in range(ROWS)])


def choices(case: str, rank: int, ranks: int) -> torch.Tensor:
    """−1: none. `all`: every row of every rank, its own included; `one`: all ranks
    want rank 0's row 3, twice."""
    if case == "all":
        return torch.arange(ranks * ROWS).flip(0)
    if case == "one":
        return torch.tensor([3, -1, 3])
    if case == "none":
        return torch.tensor([-1, rank * ROWS])
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-1, ranks * ROWS, (9,), generator=generator)


def carry_out(case: str, rank: int, ranks: int) -> dict:
    """What one rank fetches, the gradient of its images, and the bytes of visual tokens that it received."""
    sent, plain = [], dist.all_to_all_single

    def counted(out, x, *splits):
        sent.append(out.nbytes)
        plain(out, x, *splits)

    dist.all_to_all_single = counted
    try:
        x, chosen = images(rank).requires_grad_(), choices(case, rank, ranks)
        exchange = Exchange.plan(chosen, ROWS)
        asking = sum(sent)
        pool = torch.cat([x, exchange.fetch(x)])
        moved = sum(sent)
        has = chosen >= 0
        weight = torch.arange(1, int(has.sum()) + 1)[:, None, None] * (rank + 1.0)
        (pool[exchange.positions[has]] * weight).sum().backward()
        candidates = PackedTexts.cat([texts(rank), exchange.fetch_texts(texts(rank))])
        return {"images": pool[exchange.positions[has]].detach(), "grad": x.grad, "moved": moved,
                "asking": asking,
                "said": exchange.received_bytes(x), "gathering": gathered_bytes(x),
                "positions": exchange.positions,
                "texts": candidates.select(exchange.positions[has]).to_padded(-1)[0],
                "fetched": sum(exchange.received)}
    finally:
        dist.all_to_all_single = plain


def _rank(rank: int, ranks: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save({case: carry_out(case, rank, ranks) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


CASES, RANKS = ("all", "one", "none", "random"), 4


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, RANKS, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_those_of_gathering(results, case):
    everyone = torch.cat([images(rank) for rank in range(RANKS)]).requires_grad_()
    whole = PackedTexts.cat([texts(rank) for rank in range(RANKS)])
    loss = torch.zeros(())
    for rank, result in enumerate(results):
        chosen = choices(case, rank, RANKS)
        chosen = chosen[chosen >= 0]
        assert torch.equal(result[case]["images"], everyone[chosen])
        assert torch.equal(result[case]["texts"], whole.select(chosen).to_padded(-1)[0])
        weight = torch.arange(1, len(chosen) + 1)[:, None, None] * (rank + 1.0)
        loss = loss + (everyone[chosen] * weight).sum()
    if everyone.grad is None and loss.requires_grad:
        loss.backward()
    for rank, part in enumerate(everyone.grad.split(ROWS)):
        torch.testing.assert_close(results[rank][case]["grad"], part)


@pytest.mark.parametrize("case", CASES)
def test_only_chosen_rows_move_and_each_once(results, case):
    """At most twice the chosen rows' share of what gathering moves, including the request itself."""
    for rank, result in enumerate(results):
        chosen, found = choices(case, rank, RANKS), result[case]
        away = chosen[(chosen >= 0) & (chosen // ROWS != rank)]
        assert found["fetched"] == len(away.unique())
        assert found["moved"] - found["asking"] == found["said"] == found["fetched"] * TOKENS * WIDTH * 4
        assert found["gathering"] == (RANKS - 1) * ROWS * TOKENS * WIDTH * 4
        if len(away):
            share = len(away) / ((RANKS - 1) * ROWS)
            assert found["moved"] <= 2 * share * found["gathering"]


def test_nothing_chosen_stays_so(results):
    for rank, result in enumerate(results):
        assert result["none"]["positions"].tolist() == [-1, 0]
        expected = [-1 if c < 0 else c - rank * ROWS if c // ROWS == rank else None
                    for c in choices("random", rank, RANKS).tolist()]
        found = result["random"]["positions"].tolist()
        assert all(f == e if e is not None else f >= ROWS for f, e in zip(found, expected, strict=True))


def test_one_rank_alone_takes_its_own():
    x, chosen = images(0), torch.tensor([2, -1, 0])
    exchange = Exchange.plan(chosen, ROWS)
    assert torch.equal(exchange.positions, chosen) and len(exchange.fetch(x)) == 0
    assert len(exchange.fetch_texts(texts(0))) == 0 and exchange.received_bytes(x) == gathered_bytes(x) == 0
