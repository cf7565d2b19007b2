"""Images for inference: one at a time on a CPU, so that an image's visual tokens are its own to the last bit."""

import pytest
import torch

from blip_fast.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.inference import encode_images, evaluating
from blip_fast.model import BlipModel

SIZE = 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = VisionConfig(image_size=SIZE, patch_size=16, width=48, layers=3, heads=3)
    text = TextConfig(vocab_size=120, width=48, layers=2, heads=3, mlp_width=96, max_positions=32)
    return BlipModel(BlipConfig(vision, text, text_stacks="decoder", contrastive=False, matching=False))


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_neighbours_change_nothing(model, pixels):
    """Bit-equal in float32, whatever the batch; and what a whole batch gives, up to rounding."""
    with evaluating(model):
        together = torch.cat(list(encode_images(model, pixels)))
        apart = torch.cat(list(encode_images(model, [pixels[:1], pixels[1:2], pixels[:0], pixels[2:]])))
        alone = torch.cat([next(encode_images(model, image[None])) for image in pixels])
        batched = model.encode_images(pixels)
    assert torch.equal(together, apart) and torch.equal(together, alone)
    torch.testing.assert_close(together, batched, rtol=2e-5, atol=2e-5)


def test_batches_stay_as_they_come(model, pixels):
    tokens, width = model.config.vision.tokens, model.config.vision.width
    with evaluating(model):
        found = [embeds.shape for embeds in encode_images(model, iter([pixels[:2], pixels[:0], pixels[2:]]))]
    assert found == [(2, tokens, width), (3, tokens, width)]


def test_pixels_are_cast(model, pixels):
    """Pixels are float32, whatever the model's type."""
    low = BlipModel(model.config).to(torch.bfloat16)
    with evaluating(low):
        assert next(encode_images(low, pixels)).dtype == torch.bfloat16
