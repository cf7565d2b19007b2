"""Parity with the published code: its own `.pth` files, inputs and outputs (`original_blip` of the data
directory).

Token ids of its beam search are compared in the tests of generation.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blip_fast.checkpoint import load_model
from blip_fast.checkpoint.names import original_layout
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream


@dataclass(frozen=True)
class Published:
    path: Path
    notes: dict
    arrays: dict[str, torch.Tensor]

    def model(self, **options) -> BlipModel:
        return load_model(self.path, **options)[0]

    def texts(self) -> PackedTexts:
        ids, mask = self.arrays["input_ids"], self.arrays["attention_mask"]
        return PackedTexts.from_lists([row[: int(kept.sum())].tolist()
                                       for row, kept in zip(ids, mask, strict=True)])


def published(data_root: Path, name: str) -> Published:
    root = data_root / "original_blip"
    with np.load(root / f"{name}_io.npz", allow_pickle=False) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return Published(root / f"{name}.pth", json.loads((root / f"{name}.json").read_text()), tensors)


@pytest.fixture(scope="module")
def itm(data_root) -> Published:
    return published(data_root, "itm")


@pytest.fixture(scope="module")
def caption(data_root) -> Published:
    return published(data_root, "caption")


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


@torch.no_grad()
def test_matching_model(itm):
    """Image states, ITM logits with [CLS] first (inference) and [ENC] first (evaluation), features and
    cosines."""
    model, arrays, texts = itm.model(), itm.arrays, itm.texts()
    assert texts.token_ids[0] == model.config.tokens.cls
    image_embeds = model.encode_images(arrays["images"])
    close(image_embeds, arrays["image_embeds"])
    kv, images = model.stack("encoder").image_kv(image_embeds), torch.arange(len(texts))
    close(model.match_logits(texts, images, kv), arrays["itm_logits"])
    close(model.match_logits(texts.with_first(model.config.tokens.enc), images, kv),
          arrays["contrast_itm_logits_with_enc"])
    image_features, text_features = model.image_features(image_embeds), model.text_features(texts)
    close(image_features, arrays["image_feat"])
    close(text_features, arrays["text_feat"])
    close(image_features @ text_features.T, arrays["itc_sim"])


@torch.no_grad()
def test_matching_model_hidden_states(itm):
    """Every row of every text, image-grounded (padding left out: the published rows there mean nothing)."""
    model, arrays, texts = itm.model(), itm.arrays, itm.texts()
    kv = model.stack("encoder").image_kv(model.encode_images(arrays["images"]))
    (hidden,) = model.stack("encoder")([TextStream(texts, "encoder", torch.arange(len(texts)))], kv)
    close(hidden, arrays["itm_hidden"][arrays["attention_mask"].bool()])


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 2])
def test_feature_extractor(itm, index):
    """The published feature extractor: text states with [CLS] first, image-grounded ones with [ENC] first."""
    model, arrays = itm.model(), itm.arrays
    stack, tokens = model.stack("encoder"), model.config.tokens
    length = arrays[f"base{index}_text"].shape[1]
    ids = arrays["input_ids"][index, :length].tolist()
    text = PackedTexts.from_lists([ids])
    assert ids[-1] == tokens.sep
    close(stack([TextStream(text, "encoder")])[0], arrays[f"base{index}_text"][0])
    image_embeds = model.encode_images(arrays["images"][index : index + 1])
    grounded = TextStream(text.with_first(tokens.enc), "encoder", torch.tensor([0]))
    close(stack([grounded], stack.image_kv(image_embeds))[0], arrays[f"base{index}_multimodal"][0])


@torch.no_grad()
def test_positions_resized_to_96_px(itm):
    model, arrays = itm.model(image_size=96), itm.arrays
    assert model.config.vision.image_size == 96
    close(model.vision.position_embeds, arrays["pos_embed_96"][0], 1e-6)
    close(model.encode_images(arrays["images_96"]), arrays["image_embeds_96"])


def captioning_loss(model: BlipModel, caption: Published) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [rows, vocab], loss) of the published captioning step: the prompt's targets carry none."""
    texts = caption.texts()
    kv = model.stack("decoder").image_kv(model.encode_images(caption.arrays["images"]))
    logits = model.lm_logits(texts, torch.arange(len(texts)), kv)
    targets = caption.arrays["decoder_targets"][caption.arrays["attention_mask"].bool()].roll(-1)
    targets[texts.offsets[1:].long() - 1] = -100  # nothing follows a text's last token
    return logits, F.cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.1)


def test_captioning_model(caption):
    model, arrays = caption.model(), caption.arrays
    with torch.no_grad():
        close(model.encode_images(arrays["images"]), arrays["image_embeds"])
        logits, loss = captioning_loss(model, caption)
    rows = arrays["attention_mask"].bool()
    close(logits[:, caption.notes["lm_probe_columns"]], arrays["lm_logits_probe"][rows])
    close(logits.double().logsumexp(-1), arrays["lm_logits_lse"][rows])
    close(logits.double().mean(-1), arrays["lm_logits_mean"][rows])
    assert torch.equal(logits.argmax(-1), arrays["lm_logits_argmax"][rows])
    close(loss, arrays["loss"])


def test_captioning_gradients(caption):
    model = caption.model()
    captioning_loss(model, caption)[1].backward()
    gradients = original_layout(model.config).split(
        {name: parameter.grad for name, parameter in model.named_parameters()})
    names = caption.notes["grad_param_names"]
    assert sorted(gradients) == sorted(names)
    norms = torch.stack([gradients[name].double().norm() for name in names])
    torch.testing.assert_close(norms, caption.arrays["grad_norm_params"], rtol=1e-4, atol=1e-6)
    total = torch.stack([parameter.grad.double().norm() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(total, caption.arrays["grad_norm_total"], rtol=1e-4, atol=0)
    for part, expected in zip(caption.notes["grad_top_names"], caption.arrays["grad_norm_top"], strict=True):
        norm = torch.stack([gradients[name].double().norm() for name in names
                            if name.startswith(part + ".")]).norm()
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
