"""A small model and its batches, for the product and the textbook, and the comparison of their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from blip_train.steps.pretraining import Batch
from reference import pretraining as textbook
from reference.model import Sizes

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts

PAIRS = 5  # pairs per batch
CONFIG = BlipConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2),
    text=TextConfig(width=32, layers=2, heads=2, mlp_width=64, max_positions=32, dropout=0.0),
    embed_dim=16,
)
SIZES = Sizes(image_size=32, patch_size=16, vision_width=32, vision_layers=2, vision_heads=2, positions=32,
              text_width=32, text_layers=2, text_heads=2, text_feed_forward=64, projection=16)


def make_batch(step: int, rank: int) -> Batch:
    """Captions of 4 to 9 tokens; ids repeat within a batch and across ranks."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    texts = [[101, *torch.randint(1000, 2000, (int(n),), generator=generator).tolist(), 102]
             for n in torch.randint(2, 8, (PAIRS,), generator=generator)]
    images = torch.randn(PAIRS, 3, 32, 32, generator=generator)
    return Batch(images, PackedTexts.from_lists(texts), torch.randint(0, 6, (PAIRS,), generator=generator))


def make_model(config: BlipConfig = CONFIG) -> BlipModel:
    """A model with weights so large that attention is not uniform and every loss has a notable gradient."""
    torch.manual_seed(0)
    model = BlipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape != (1,):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def everyone(x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    if ranks == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(parts, x)
    return parts


def padded(batch: Batch) -> textbook.Batch:
    ids, mask = batch.texts.to_padded(0)
    longest = 9
    ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[1]))
    mask = torch.nn.functional.pad(mask, (0, longest - mask.shape[1]))
    return textbook.Batch(batch.images, ids, mask.long(), batch.ids)


def check_gradients(ours: dict[str, torch.Tensor], reference: dict[str, torch.nn.Parameter]) -> None:
    """Each parameter's gradient must agree within 1e-4 of its norm. Key biases have a true gradient of 0:
    there both sides have rounding noise, far below 1e-6 of the whole gradient."""
    trained = {key: p.grad for key, p in reference.items() if p.grad is not None}
    whole = torch.stack([grad.norm() for grad in trained.values()]).norm()
    assert len(trained) > 60
    for key, wanted in trained.items():
        error = (ours[key].view_as(wanted) - wanted).norm()
        assert error <= 1e-4 * wanted.norm() + 1e-6 * whole, f"{key}: {error:.2e} of {wanted.norm():.2e}"
