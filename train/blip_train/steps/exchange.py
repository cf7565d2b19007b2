"""Rows that ranks fetch from each other's batches: only those they chose, with
gradients flowing back to the owners.

A negative drawn from all ranks' batches is named by its row number in their concatenation, rank by rank.
Gathering every rank's visual tokens would move (ranks − 1) × batch rows to every rank (base model, 224 px,
512 ranks of 75: 23 GB per step). A rank reads at most `batch` of these rows, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from blip_fast.model.packed_texts import PackedTexts
from blip_train.collectives import world


@dataclass(frozen=True)
class Exchange:
    """Who sends which rows to whom. All ranks call `plan` together to make it.

    positions: int64 [n], positions of the chosen rows among the rank's own `rows` followed by the fetched
        ones; −1 where nothing was chosen.
    lent: int64 [sum(sent)], own rows to send, for each rank in turn. `sent` and
    `received` count rows by rank.
    """

    rows: int
    positions: Tensor
    lent: Tensor
    sent: list[int]
    received: list[int]

    @classmethod
    def plan(cls, chosen: Tensor, rows: int) -> Exchange:
        """Ask the owners for the rows `chosen`, int64 [n]: rank × rows + row, or −1 for
        none. Each rank has `rows`."""
        rank, ranks = world()
        if ranks == 1:
            return cls(rows, chosen, chosen.new_empty(0), [0], [0])
        away = (chosen >= 0) & (chosen // rows != rank)
        wanted = chosen[away].unique()  # sorted, so grouped by owner; a row chosen twice is sent once
        received = torch.bincount(wanted // rows, minlength=ranks)
        sent = _all_to_all(received, [1] * ranks, [1] * ranks)
        counts = torch.stack([sent, received]).tolist()
        lent = _all_to_all(wanted % rows, counts[1], counts[0])
        fetched = rows + torch.searchsorted(wanted, chosen)
        positions = torch.where(away, fetched, torch.where(chosen < 0, chosen, chosen - rank * rows))
        return cls(rows, positions, lent, *counts)

    def fetch(self, x: Tensor) -> Tensor:
        """The rows that this rank chose from the others' `x` [rows, …]: [sum(received), …].

        Gradients flow back, and are added up where several ranks chose the same row.
        """
        return x[:0] if world()[1] == 1 else _Fetch.apply(x, self)

    def fetch_texts(self, texts: PackedTexts) -> PackedTexts:
        """The texts that this rank chose from the others'."""
        lent = texts.select(self.lent)
        if world()[1] == 1:
            return lent
        lengths = _all_to_all(lent.lengths, self.sent, self.received)
        tokens = torch.stack([_by_rank(lent.lengths, self.sent), _by_rank(lengths, self.received)]).tolist()
        token_ids = _all_to_all(lent.token_ids, *tokens)
        return PackedTexts(token_ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())

    def received_bytes(self, x: Tensor) -> int:
        """How much `fetch(x)` brings to this rank."""
        return sum(self.received) * x[:1].nbytes


def gathered_bytes(x: Tensor) -> int:
    """How much gathering x [rows, …] from all ranks would bring to this one."""
    return (world()[1] - 1) * x.nbytes


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[override]
        ctx.exchange = exchange
        return _all_to_all(x.index_select(0, exchange.lent), exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        exchange: Exchange = ctx.exchange
        returned = _all_to_all(grad, exchange.received, exchange.sent)
        total = grad.new_zeros((exchange.rows, *grad.shape[1:]))
        # Unlike index_add_, index_put_ adds repeated rows in a fixed order on GPUs too.
        return total.index_put_((exchange.lent,), returned, accumulate=True), None


def _all_to_all(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """x [sum(sent), …], rows for each rank in turn → [sum(received), …]. Sent as bytes, so that any
    dtype works on any backend."""
    row = x[0].nbytes if len(x) else x.new_empty(x.shape[1:]).nbytes
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out.flatten().view(torch.uint8), x.contiguous().flatten().view(torch.uint8),
                           [n * row for n in received], [n * row for n in sent])
    return out


def _by_rank(lengths: Tensor, counts: list[int]) -> Tensor:
    """Sum of the first counts[0] lengths, of the next counts[1], …: int64 [ranks]."""
    rank = torch.arange(len(counts), device=lengths.device).repeat_interleave(
        torch.tensor(counts, device=lengths.device), output_size=sum(counts))
    return torch.zeros(len(counts), dtype=torch.int64, device=lengths.device).index_add_(0, rank, lengths)
