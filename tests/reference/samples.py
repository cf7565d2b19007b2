"""Small models, texts and published files that tests of the reference and of the product start from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from .model import Sizes

SMALL = Sizes(
    image_size=32, patch_size=16, vision_width=24, vision_layers=2, vision_heads=3, positions=32,
    text_width=32, text_layers=2, text_heads=4, text_feed_forward=48, projection=16,
)  # fmt: skip


def roughened(model: nn.Module) -> nn.Module:
    """Noise on every parameter, so that no bias is 0, no norm is 1 and greedy decoding does not repeat one token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def texts(*lengths: int, padded_to: int) -> tuple[Tensor, Tensor]:
    """Random texts [CLS] ... [SEP] of the given lengths, padded: ids and mask."""
    ids, mask = torch.zeros(len(lengths), padded_to, dtype=torch.long), torch.zeros(len(lengths), padded_to)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([101, *torch.randint(1000, 30_000, (length - 2,)).tolist(), 102])
        mask[row, :length] = 1
    return ids, mask.long()


def published(kind: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor], Sizes]:
    """Configuration, weights and expected outputs of one published model."""
    root = os.environ.get("BLIP_FAST_DATA")
    if not root:
        pytest.skip("set BLIP_FAST_DATA to the data folder to compare with files saved by the published code")
    folder = Path(root) / "original_blip"
    config = json.loads((folder / f"{kind}.json").read_text())
    weights = torch.load(folder / f"{kind}.pth", weights_only=True)["model"]
    with np.load(folder / f"{kind}_io.npz") as arrays:
        expected = {name: torch.from_numpy(array) for name, array in arrays.items()}
    vision, text = config["vit_config"], config["text_config"]
    sizes = Sizes(
        image_size=vision["img_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["embed_dim"],
        vision_layers=vision["depth"],
        vision_heads=vision["num_heads"],
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_feed_forward=text["intermediate_size"],
        projection=config.get("embed_dim", 256),
    )
    return config, weights, expected, sizes


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=tolerance, atol=tolerance)
