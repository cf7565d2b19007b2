"""Which batches a rank computes: the slots of a step, and the readers that fill them.

A step has `ranks × accumulation` slots of one batch each. The data is divided among readers, called
streams. Slot i belongs to rank i // accumulation and is filled by stream i × streams // slots. The numbers
of slots and streams belong to the run, not to the machine: on other ranks a slot keeps its stream, and
each batch brings its own seed. So a resumed run continues with the same batches, negatives and dropout
masks, whichever rank computes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Streams:
    """`slots` batches per step, from `streams` readers.

    Raises ValueError if `ranks` ranks cannot share them evenly.
    """

    slots: int
    streams: int
    ranks: int

    def __post_init__(self) -> None:
        if self.streams % self.ranks:
            raise ValueError(f"{self.ranks} ranks cannot share {self.streams} reader(s) of the data evenly: "
                             "set runtime.ranks to a number that divides them, or runtime.streams to a "
                             "multiple of ranks")
        if self.slots % self.streams:
            raise ValueError(f"{self.streams} readers cannot fill the {self.slots} batches of a step (ranks "
                             "× runtime.accumulation) evenly: choose a multiple of streams / ranks")

    def of_rank(self, rank: int) -> list[int]:
        """The stream of each of a rank's slots."""
        each = self.slots // self.ranks
        return [slot * self.streams // self.slots for slot in range(rank * each, (rank + 1) * each)]
