"""Packed texts: the one data structure for texts. The token rows of all texts lie one after another, without
padding.

A text is a segment: text `i` owns the rows `offsets[i] : offsets[i + 1]`. Attention, the text stack, the
losses and the generation engine all read this layout, so no row is ever computed for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Token rows of all texts, concatenated. Every text has at least one token; there may be no text at all.

    `token_ids` int64 [rows], `offsets` int32 [texts + 1] (offsets[0] = 0, offsets[texts] = rows), on one
    device. Raises ValueError where shapes, dtypes or devices disagree, and on the CPU where offsets do not
    rise from 0 to the number of rows (on a GPU that check would stall the stream).
    """

    token_ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        ids, offsets = self.token_ids, self.offsets
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"token_ids must be int64 [rows], got {ids.dtype} {list(ids.shape)}")
        if offsets.ndim != 1 or offsets.dtype != torch.int32 or len(offsets) == 0:
            raise ValueError(f"offsets must be int32 [texts + 1], got {offsets.dtype} {list(offsets.shape)}")
        if ids.device != offsets.device:
            raise ValueError(f"token_ids are on {ids.device}, offsets on {offsets.device}: move both to one "
                             "device")
        if ids.device.type == "cpu":
            start, end = int(offsets[0]), int(offsets[-1])
            if start != 0 or end != len(ids):
                raise ValueError(f"offsets must run from 0 to {len(ids)} rows, got {start} to {end}")
            if bool((offsets.diff() < 1).any()):
                raise ValueError("every text needs at least one token: offsets must rise strictly")

    @classmethod
    def from_lists(cls, texts: Sequence[Sequence[int]]) -> PackedTexts:
        """Pack lists of token ids. Raises ValueError naming the first text that has no token."""
        for i, text in enumerate(texts):
            if len(text) == 0:
                raise ValueError(f"text {i} has no token: every text needs at least its first token")
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        rows = [token for text in texts for token in text]
        return cls(torch.tensor(rows, dtype=torch.int64), _offsets(lengths))

    @classmethod
    def cat(cls, parts: Sequence[PackedTexts]) -> PackedTexts:
        """All texts of all parts, in order. Raises ValueError without parts."""
        if not parts:
            raise ValueError("cannot concatenate zero parts: pass at least one PackedTexts")
        lengths = torch.cat([part.lengths for part in parts])
        return cls(torch.cat([part.token_ids for part in parts]), _offsets(lengths))

    def __len__(self) -> int:
        """How many texts."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 [texts]."""
        return self.offsets.diff().long()

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def positions(self) -> Tensor:
        """Position of each row within its text, int64 [rows]: 0, 1, … for every text."""
        return torch.arange(len(self.token_ids), device=self.device) - self._per_row(self.offsets[:-1].long())

    def text_of_row(self) -> Tensor:
        """Which text each row belongs to, int64 [rows]."""
        return self._per_row(torch.arange(len(self), device=self.device))

    def first_rows(self) -> Tensor:
        """Row of each text's first token, int32 [texts]."""
        return self.offsets[:-1]

    def select(self, indices: Tensor) -> PackedTexts:
        """Texts `indices` (int64 [n], any order, repeats allowed), gathered without a loop over texts."""
        offsets = _offsets(self.lengths[indices])
        rows = int(offsets[-1])
        # Row r of the new text j is r - offsets[j] rows after the start of the old text indices[j].
        shift = (self.offsets[:-1][indices] - offsets[:-1]).long()
        shift = shift.repeat_interleave(offsets.diff(), output_size=rows)
        source = torch.arange(rows, device=self.device) + shift
        return PackedTexts(self.token_ids[source], offsets)

    def with_first(self, token_id: int) -> PackedTexts:
        """The same texts with the first token of each replaced: [CLS], [ENC] or [DEC] choose the mode."""
        return PackedTexts(self.token_ids.index_fill(0, self.first_rows().long(), token_id), self.offsets)

    def without_last(self) -> PackedTexts:
        """The last token of each text dropped (a prompt loses its [SEP]). Every text needs two tokens or
        more."""
        return self._one_shorter(skip=0)

    def without_first(self) -> PackedTexts:
        """The first token of each text dropped: the targets that `without_last` predicts. Every text needs
        two tokens or more."""
        return self._one_shorter(skip=1)

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same texts on `device`; the copy to a GPU does not block where the memory is pinned."""
        return PackedTexts(self.token_ids.to(device, non_blocking=True),
                           self.offsets.to(device, non_blocking=True))

    def to_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """(ids int64 [texts, longest] filled up with `pad_id`, mask bool [texts, longest] true on tokens)."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(self) else 0
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        ids = torch.full(mask.shape, pad_id, dtype=torch.int64, device=self.device)
        ids[mask] = self.token_ids
        return ids, mask

    def _per_row(self, per_text: Tensor) -> Tensor:
        """[texts] → [rows]; the known output size spares a GPU the wait for the sum of lengths."""
        return per_text.repeat_interleave(self.lengths, output_size=len(self.token_ids))

    def _one_shorter(self, skip: int) -> PackedTexts:
        # Text i has lost i tokens before its own rows start, so its rows move up by i.
        texts, rows = len(self), len(self.token_ids)
        lost = torch.arange(texts + 1, device=self.device, dtype=torch.int32)
        if rows < 2 * texts:
            raise ValueError(f"{texts} texts have {rows} tokens: dropping one from each needs two or more in "
                             "each")
        source = torch.arange(rows - texts, device=self.device) + skip
        source += lost[:-1].long().repeat_interleave(self.lengths - 1, output_size=rows - texts)
        return PackedTexts(self.token_ids[source], self.offsets - lost)


def _offsets(lengths: Tensor) -> Tensor:
    """Lengths [texts] → offsets int32 [texts + 1]."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets
