"""Captions of random models at 224 px, three beams, beside transformers: the same weights, pixels and prompt."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import pytest
import torch
import transformers

from blip_fast.checkpoint import load_model
from blip_fast.generate import GenerationConfig, generate
from blip_fast.model import BlipModel

SIZES = {  # width, layers, heads, of image and text alike; images
    "small": (384, 6, 6, 8),
    "base": (768, 12, 12, 2),
}
PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of
SEP = 102
MAX_LENGTH, MIN_LENGTH, BEAMS = 20, 5, 3


@pytest.fixture(scope="module", params=SIZES)
def models(request) -> tuple[BlipModel, transformers.BlipForConditionalGeneration, int]:
    """Ours and theirs with the same random weights, spread so that no two beams are all but equal; and the images."""
    width, layers, heads, images = SIZES[request.param]
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
             "num_attention_heads": heads}
    config = transformers.BlipConfig(
        text_config={**shape, "encoder_hidden_size": width, "sep_token_id": SEP, "eos_token_id": SEP},
        vision_config={**shape, "image_size": 224, "patch_size": 16})
    torch.manual_seed(0)
    theirs = transformers.BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * width**-0.5)
    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours, _ = load_model(directory)
    return ours, theirs, images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captioning(side_by_side, models, dtype):
    ours, theirs, images = models
    for model in (ours, theirs):
        model.to(getattr(torch, dtype))
    pixels = torch.randn(images, 3, 224, 224, dtype=getattr(torch, dtype))
    prompts_and_sep = torch.tensor([[*PROMPT, SEP]] * images)
    config = GenerationConfig(beams=BEAMS, max_length=MAX_LENGTH, min_length=MIN_LENGTH)

    def caption() -> list[list[int]]:
        with torch.inference_mode():
            image_kv = ours.stack("decoder").image_kv(ours.encode_images(pixels))
        return [text.token_ids for text in generate(ours, image_kv, [PROMPT] * images, config)]

    def their_caption() -> list[list[int]]:  # their generate drops the [SEP] behind a prompt
        return theirs.generate(pixels, prompts_and_sep, num_beams=BEAMS, max_length=MAX_LENGTH, min_length=MIN_LENGTH,
                               do_sample=False).tolist()

    results = side_by_side(caption, {"transformers": their_caption}, 3)
    if dtype == "float32":  # in 16 bits two beams may change places
        assert results["ours"] == [ids[: len(own)] for ids, own in zip(results["transformers"], results["ours"],
                                                                       strict=True)]
