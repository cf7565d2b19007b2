"""A pre-training step, losses and gradients, beside the textbook's five padded passes: the same weights, batch and
negatives. Neither side has dropout or an optimiser."""

from __future__ import annotations

import pytest
import torch
from blip_train.pretraining import Batch, Objective, Pretraining
from reference import pretraining as textbook
from reference.model import Sizes

from blip_fast.checkpoint.names import original_layout
from blip_fast.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model import BlipModel
from blip_fast.packing import PackedTexts

SIZES = {"small": (384, 6, 6, 8), "base": (768, 12, 12, 2)}  # width, layers, heads, of image and text alike; pairs
CASES = [("small", "float32"), ("small", "bfloat16"), ("base", "bfloat16")]
PADDED, ALPHA = 30, 0.4  # captions are padded to 30 tokens, as published
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


def make_config(width: int, layers: int, heads: int) -> BlipConfig:
    return BlipConfig(VisionConfig(width=width, layers=layers, heads=heads),
                      TextConfig(width=width, layers=layers, heads=heads, mlp_width=4 * width, dropout=0.0))


def make_batch(pairs: int) -> Batch:
    """Captions of 8 to 20 tokens, 14 on average, as those of web and COCO images are."""
    texts = [[101, *torch.randint(1000, 30000, (int(length) - 2,)).tolist(), 102]
             for length in torch.linspace(8, 20, pairs).round()]
    return Batch(torch.randn(pairs, 3, 224, 224), PackedTexts.from_lists(texts), torch.arange(pairs))


def make_textbook(ours: Pretraining) -> textbook.TextbookPretraining:
    """The textbook with the product's weights and queue."""
    config, layout = ours.model.config, original_layout(ours.model.config)
    vision, text = config.vision, config.text
    theirs = textbook.TextbookPretraining(Sizes(
        vision_width=vision.width, vision_layers=vision.layers, vision_heads=vision.heads, text_width=text.width,
        text_layers=text.layers, text_heads=text.heads, text_feed_forward=text.mlp_width))
    state = layout.split(dict(ours.model.state_dict()))
    state |= layout.stored_twice(state)
    state |= {name: value for name, value in theirs.state_dict().items() if name.endswith("position_ids")}
    theirs.load_weights({name: state[name] for name in theirs.state_dict() if name in state})
    theirs.image_queue.copy_(ours.queue.image.T)
    theirs.text_queue.copy_(ours.queue.text.T)
    return theirs


@pytest.mark.parametrize(("size", "precision"), CASES)
def test_training_step(side_by_side, size, precision):
    *shape, pairs = SIZES[size]
    torch.manual_seed(0)
    ours = Pretraining(BlipModel(make_config(*shape)), Objective(), seed=0)
    theirs, batch = make_textbook(ours), make_batch(pairs)
    ids, mask = batch.texts.to_padded(0)
    padding = (0, PADDED - ids.shape[1])
    padded = textbook.Batch(batch.images, torch.nn.functional.pad(ids, padding),
                            torch.nn.functional.pad(mask, padding).long())

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")

    def step() -> tuple[dict[str, torch.Tensor], textbook.Negatives]:
        torch.manual_seed(1)  # the same negatives every time
        ours.zero_grad()
        ours.follow()
        with autocast():
            output = ours(batch, ALPHA)
        output.total.backward()
        ours.enqueue(output)
        return output.losses, textbook.Negatives(output.negatives.image_for_text, output.negatives.text_for_image)

    def their_step() -> dict[str, torch.Tensor]:
        theirs.zero_grad()
        with autocast():
            output = theirs.step([padded], ALPHA, [negatives])
        output.loss.backward()
        return {"itc": output.itc[0], "itm": output.itm[0], "lm": output.lm[0]}

    losses, negatives = step()
    wanted = their_step()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), wanted[name].float(), rtol=TOLERANCES[precision], atol=0, msg=name)
    side_by_side(step, {"textbook": their_step}, 3, warm_up=0)
