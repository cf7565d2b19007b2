"""The queue of momentum features that serve as additional keys of the contrastive loss
(MoCo's, one per modality)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blip_kernels.contrastive import NO_ID
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last `size` image and text features of all ranks, with their ids.

    Buffers: `image`, `text` [size, embed_dim], `ids` int64 [size] (`NO_ID` where never filled), `pointer`
    int64. The features start as normalised Gaussian vectors drawn from `seed`.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, embed_dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("image", "text"):
            self.register_buffer(name, F.normalize(torch.randn(size, embed_dim, generator=generator), dim=1))
        self.register_buffer("ids", torch.full((size,), NO_ID, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest entries, wrapping at the end. Of more rows than slots the last are kept.

        Args:
            image: [rows, embed_dim]; text: the same; ids: int64 [rows].
        """
        size, rows = len(self.ids), len(ids)
        if size == 0:
            return
        kept = slice(max(rows - size, 0), rows)
        slots = (self.pointer + torch.arange(rows, device=self.ids.device)[kept]) % size
        self.image.index_copy_(0, slots, image[kept].to(self.image.dtype))
        self.text.index_copy_(0, slots, text[kept].to(self.text.dtype))
        self.ids.index_copy_(0, slots, ids[kept])
        self.pointer.copy_((self.pointer + rows) % size)
