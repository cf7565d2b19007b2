"""The vision transformer: pictures to visual tokens (pre-norm, [CLS] first, learned absolute positions)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from blip_kernels import attention, linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_fast.model.config import VisionConfig
from blip_fast.model.linear_layer import Linear, layer_after


class VisionTransformer(nn.Module):
    """ViT of BLIP section 3.1. `forward` returns the normed last hidden state."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed: nn.Module = PatchEmbed(config.width, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.position_embeds = nn.Parameter(torch.zeros(config.tokens, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config, index) for index in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.recomputed = 0  # see BlipModel.recompute

    def forward(self, pixels: Tensor, cls_only: bool = False) -> Tensor:
        """Encode pictures.

        Args:
            pixels: [batch, 3, image_size, image_size], normalised.
            cls_only: compute the last block for the [CLS] row alone (all that a momentum encoder is read
                for).

        Returns:
            [batch, tokens, width], or [batch, 1, width] with `cls_only`.

        Raises:
            ValueError: the pictures are not of the size that the positions were made for.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [batch, 3, {size}, {size}], got {tuple(pixels.shape)}: resize "
                             "the images or the model's position embeddings")
        batch = pixels.shape[0]
        patches = self._embed_patches(pixels)
        cls = self.cls_token.expand(batch, 1, -1)
        x = (torch.cat([cls.to(patches.dtype), patches], dim=1) + self.position_embeds).flatten(0, 1)
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * self.config.tokens
        for index, block in enumerate(self.blocks):
            last = self.config.layers - index
            run = partial(checkpoint, block, use_reentrant=False) if last <= self.recomputed else block
            x = run(x, offsets, cls_only=cls_only and last == 1)
        return self.norm(x).view(batch, -1, self.config.width)

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        """[batch, 3, size, size] → [batch, patches, width]."""
        p, grid = self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = pixels.view(-1, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        return self.patch_embed(patches.reshape(-1, grid * grid, 3 * p * p))


class PatchEmbed(nn.Conv2d):
    """A convolution over patches that do not overlap and lie in rows: one matrix product."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__(3, width, patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:
        """[..., 3 × patch_size²] → [..., width]."""
        return linear(input, self.weight.flatten(1), self.bias)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        self.heads, self.tokens = config.heads, config.tokens
        # a ratio of two widths may lie a rounding error below
        hidden = round(config.width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, 3 * config.width)
        self.attention_out = Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp_in = Linear(config.width, hidden)
        self.activation = nn.GELU()
        self.mlp_out = Linear(hidden, config.width)
        self.drop_path = config.drop_path * index / max(config.layers - 1, 1)

    def forward(self, x: Tensor, offsets: Tensor, cls_only: bool) -> Tensor:
        """x: [batch × tokens, width] → the same, or [batch, width] with `cls_only`."""
        q, k, v = layer_after(self.norm1, self.qkv, x).view(len(x), 3, self.heads, -1).unbind(1)
        q_offsets = offsets
        if cls_only:
            x, q = x[:: self.tokens], q[:: self.tokens]
            q_offsets = torch.arange(len(offsets), dtype=torch.int32, device=x.device)
        images = len(offsets) - 1
        attended = self.attention_out(attention(q, k, v, q_offsets, offsets).flatten(1))
        x = x + self._drop_path(attended, images)
        hidden = layer_after(self.norm2, self.mlp_in, x)
        return x + self._drop_path(layer_after(self.activation, self.mlp_out, hidden), images)

    def _drop_path(self, x: Tensor, images: int) -> Tensor:
        """Stochastic depth: the whole branch of an image is dropped, the others are scaled up."""
        if not self.training or self.drop_path == 0.0:
            return x
        keep = 1.0 - self.drop_path
        kept = torch.empty(images, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep).div_(keep)
        return (x.view(images, -1, x.shape[-1]) * kept).view_as(x)


def resize_positions(position_embeds: Tensor, tokens: int) -> Tensor:
    """Bicubic resize of learned positions to another image size, [CLS] kept as it is (BLIP's
    `interpolate_pos_embed`).

    Args:
        position_embeds: [old tokens, width].
        tokens: new number of tokens, a square number plus one.

    Returns:
        [tokens, width] in the same dtype.
    """
    if len(position_embeds) == tokens:
        return position_embeds
    old, new = round((len(position_embeds) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if old * old + 1 != len(position_embeds) or new * new + 1 != tokens:
        raise ValueError(f"position embeddings are for square images: cannot resize {len(position_embeds)} "
                         f"to {tokens}")
    grid = position_embeds[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(position_embeds.dtype)
    return torch.cat([position_embeds[:1], patches])
