"""Models and images for inference on a CPU: linear layers packed, and one image at a time, so that its visual
tokens are its own to the last bit."""

from copy import deepcopy

import pytest
import torch
from blip_kernels.cpu import processor
from hf_models import save_model, small_tokenizer

from blip_fast.inference.cpu_packing import (
    PackedLinear,
    PackedVocabularyProduct,
    pack_linear_layers,
)
from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.inference.int8 import quantise_linear_layers
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.tasks.model_loading import load_for_task

SIZE = 64


def make_model(**changes):
    torch.manual_seed(0)
    vision = VisionConfig(image_size=SIZE, patch_size=16, width=48, layers=3, heads=3)
    text = TextConfig(vocab_size=120, width=48, layers=2, heads=3, mlp_width=96, max_positions=32)
    tokens = SpecialTokens(pad=0, cls=1, sep=2, bos=3, enc=4)
    return BlipModel(BlipConfig(vision, text, tokens, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model(text_stacks="decoder", contrastive=False, matching=False)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_change_nothing_when_packed(pixels, dtype):
    """Bit-equal at base's width too, where long sums could be cut up differently for other numbers of
    rows."""
    tokens = SpecialTokens(pad=0, cls=1, sep=2, bos=3, enc=4)
    text = TextConfig(vocab_size=120, width=48, layers=1, heads=3, mlp_width=96, max_positions=32)
    wide = BlipModel(BlipConfig(VisionConfig(image_size=SIZE, layers=2), text, tokens)).to(dtype)
    pack_linear_layers(wide)
    with evaluating(wide):
        together = torch.cat(list(encode_images(wide, pixels)))
        alone = torch.cat([next(encode_images(wide, image[None])) for image in pixels])
        shifted = torch.cat(list(encode_images(wide, [pixels[:1], pixels[1:]])))
    assert torch.equal(together, alone) and torch.equal(together, shifted)


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


@torch.no_grad()
def outputs(model, pixels):
    """Everything that a tied model computes: ITC features, ITM logits and LM logits."""
    image_embeds = model.encode_images(pixels)
    lengths, images = torch.tensor([4, 1, 7, 3, 5]), torch.tensor([3, 0, 0, 4, 1])
    token_ids = torch.randint(5, 120, (20,), generator=torch.Generator().manual_seed(2))
    texts = PackedTexts.from_lists([part.tolist() for part in token_ids.split(lengths.tolist())])
    image_kv = model.stack("encoder").image_kv(image_embeds)
    return (image_embeds, model.image_features(image_embeds), model.text_features(texts.with_first(1)),
            model.match_logits(texts.with_first(4), images, image_kv),
            model.lm_logits(texts.with_first(3), images, image_kv))


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str)
def test_a_packed_model_computes_the_same(pixels, tied, dtype, tolerance):
    """Compared with the plain model, in bfloat16 with the plain one in float32: packing adds no error of its
    own."""
    plain = make_model(tied_lm_head=tied).to(dtype)
    packed = deepcopy(plain)
    pack_linear_layers(packed)
    assert not any(type(module) is torch.nn.Linear for name, module in packed.named_modules()
                   if name != "lm_head.projection")
    exact = outputs(plain.float(), pixels)
    for found, wanted in zip(outputs(packed, pixels.to(dtype)), exact, strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance,
                                   atol=tolerance * float(wanted.abs().max()))


def test_a_packed_model_holds_its_weights_once():
    plain = make_model()
    packed = deepcopy(plain)
    pack_linear_layers(packed)
    before, after = plain.state_dict(), packed.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert layers and all(name == "bias" for layer in layers for name, _ in layer.named_parameters())


def test_a_packed_model_stays_where_it_is():
    packed = make_model()
    pack_linear_layers(packed)
    for move in (packed.double, packed.half, lambda: packed.to("meta")):
        with pytest.raises(ValueError, match="load it anew"):
            move()


def test_what_cannot_be_packed_is_left():
    half = make_model().half()
    pack_linear_layers(half)
    packed = PackedLinear | PackedVocabularyProduct
    assert not any(isinstance(module, packed) for module in half.modules())


@pytest.mark.parametrize("products", [True, False])
def test_int8_weights(pixels, monkeypatch, products):
    """With products of 8 bits and without: each weight is within half a step of its output's scale (and
    bfloat16's rounding), so outputs stay near; embeddings and heads are left as they are. With products, only
    the vision blocks are quantised."""
    if products and not processor.has_int8():
        pytest.skip("this processor has no products of 8-bit integers")
    if not products:
        pytest.importorskip("torchao")
        monkeypatch.setattr(processor, "has_int8", lambda: False)
    plain = make_model()
    quantised = deepcopy(plain).bfloat16()
    quantise_linear_layers(quantised)
    weight = plain.vision.blocks[0].mlp_in.weight
    layer = quantised.vision.blocks[0].mlp_in
    held = layer.state_dict()["weight"] if products else layer.weight.dequantize()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((held.float() - weight).abs() <= 0.55 * step + 2**-7 * weight.abs()).all())
    assert torch.equal(quantised.itm_head.state_dict()["weight"], plain.itm_head.weight.bfloat16())
    if products:  # rounded activations change what texts say: those layers are left as they are too
        name = "layers.0.feed_forward.mlp_in"
        for stack, wanted in zip(quantised.text.values(), plain.text.values(), strict=True):
            assert torch.equal(stack.get_submodule(name).state_dict()["weight"],
                               wanted.get_submodule(name).weight.bfloat16())
    for found, wanted in zip(outputs(quantised, pixels.bfloat16()), outputs(plain, pixels), strict=True):
        assert float((found.float() - wanted).norm() / wanted.norm()) < 0.06


def test_types_that_cannot_be_used(monkeypatch):
    """The error comes before anything is read: the checkpoint need not even exist."""
    monkeypatch.setattr("blip_fast.inference.int8.find_spec", lambda name: None)
    monkeypatch.setattr(processor, "has_int8", lambda: False)
    with pytest.raises(ValueError, match=r"blip-fast\[int8\]"):
        load_for_task("nowhere", dtype="int8")
    monkeypatch.setattr(processor, "has_float16", lambda: False)
    with pytest.raises(ValueError, match="has no products on this CPU"):
        load_for_task("nowhere", dtype="float16", device="cpu")
    with pytest.raises(ValueError, match="threads is 0"):
        load_for_task("nowhere", threads=0, dtype="float32")


def test_threads(tmp_path):
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path)
    before = torch.get_num_threads()
    try:
        load_for_task(tmp_path, threads=before + 1, dtype="float32")
        assert torch.get_num_threads() == before + 1
        load_for_task(tmp_path, dtype="float32")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
