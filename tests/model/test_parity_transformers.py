"""Parity with transformers' BLIP: random weights saved by it, loaded by us; outputs, losses, gradients; and
back."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from blip_fast.checkpoint import load_model, save_hugging_face
from blip_fast.checkpoint.hugging_face import CLASSES
from blip_fast.checkpoint.names import hugging_face_layout
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream
from blip_fast.model.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB_SIZE = 97
CLS, SEP, BOS, ENC = 1, 2, 95, 96
SIZES = {
    "equal_widths": (
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 16},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "wide_vision_small_patch": (
        {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3,
         "image_size": 40, "patch_size": 8, "layer_norm_eps": 1e-6},
        {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
         "layer_norm_eps": 1e-5},
    ),
    "wide_text_one_patch": (
        {"hidden_size": 24, "intermediate_size": 49, "num_hidden_layers": 1, "num_attention_heads": 1,
         "image_size": 14, "patch_size": 14},
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
         "max_position_embeddings": 30},
    ),
}
LENGTHS = {"one": [5], "odd": [3, 1, 9], "equal": [4, 4]}


@dataclass(frozen=True)
class Pair:
    """The same weights in both implementations."""

    theirs: transformers.PreTrainedModel
    ours: BlipModel
    directory: Path

    def pixels(self, images: int) -> Tensor:
        size = self.ours.config.vision.image_size
        return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(images))

    def close_gradients(self) -> None:
        """Every parameter's gradient, each compared under transformers' own name."""
        ours = hugging_face_layout(self.ours.config).split(
            {name: torch.zeros_like(p) if p.grad is None else p.grad
             for name, p in self.ours.named_parameters()})
        ours.pop("temp", None)  # transformers has none
        theirs = {name: parameter.grad for name, parameter in self.theirs.named_parameters()}
        assert ours.keys() == theirs.keys()
        # The gradient of a key's bias is nothing but rounding: softmax does not see it.
        largest = max(float(gradient.abs().max()) for gradient in theirs.values() if gradient is not None)
        for name, gradient in theirs.items():
            gradient = torch.zeros_like(ours[name]) if gradient is None else gradient
            close(ours[name], gradient, scale=max(float(gradient.abs().max()), 1e-3 * largest), what=name)


def close(ours: Tensor, theirs: Tensor, scale: float | None = None, what: str = "") -> None:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max()) if scale is None else scale
    assert error <= 1e-4 * scale, f"{what} differs by {error:.2e} at a scale of {scale:.2e}"


def make_pair(architecture: str, size: str, directory: Path) -> Pair:
    """Random weights, noise on norms and biases too, written by transformers and read by us."""
    vision, text = SIZES[size]
    ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "sep_token_id": SEP, "pad_token_id": 0,
           "cls_token_id": CLS, "enc_token_id": ENC, "label_smoothing": 0.1}
    config = transformers.BlipConfig(text_config=text | ids, vision_config=vision, image_text_hidden_size=20)
    torch.manual_seed(7)
    theirs = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    theirs.save_pretrained(directory)
    return Pair(theirs, load_model(directory)[0], directory)


@pytest.fixture(scope="module", params=SIZES)
def retrieval(request, tmp_path_factory) -> Pair:
    return make_pair("BlipForImageTextRetrieval", request.param, tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module", params=SIZES)
def captioning(request, tmp_path_factory) -> Pair:
    return make_pair("BlipForConditionalGeneration", request.param, tmp_path_factory.mktemp("captioning"))


# transformers' own VQA model works only where image and text are equally wide
@pytest.fixture(scope="module")
def answering(tmp_path_factory) -> Pair:
    return make_pair("BlipForQuestionAnswering", "equal_widths", tmp_path_factory.mktemp("answering"))


@pytest.fixture(params=LENGTHS)
def lengths(request) -> list[int]:
    return LENGTHS[request.param]


def random_texts(lengths: list[int], first: int, seed: int = 0) -> PackedTexts:
    generator = torch.Generator().manual_seed(seed)
    return PackedTexts.from_lists(
        [[first, *torch.randint(3, BOS, (n,), generator=generator).tolist(), SEP] for n in lengths])


@torch.no_grad()
def test_vision(retrieval, lengths):
    pixels = retrieval.pixels(len(lengths))
    close(retrieval.ours.encode_images(pixels), retrieval.theirs.vision_model(pixels).last_hidden_state)


@torch.no_grad()
def test_features(retrieval, lengths):
    pair, texts, pixels = retrieval, random_texts(lengths, CLS), retrieval.pixels(3)
    ids, mask = texts.to_padded(0)
    theirs = pair.theirs(ids, pixels, use_itm_head=False, attention_mask=mask.long())
    features = F.normalize(pair.theirs.text_proj(theirs.question_embeds[:, 0]), dim=-1)
    close(pair.ours.text_features(texts), features, what="text features")
    image_features = pair.ours.image_features(pair.ours.encode_images(pixels))
    close(image_features @ pair.ours.text_features(texts).T, theirs.itm_score, what="cosines")


@torch.no_grad()
@pytest.mark.parametrize("first", [CLS, ENC], ids=["cls", "enc"])
def test_matching_logits(retrieval, lengths, first):
    pair, texts, pixels = retrieval, random_texts(lengths, first), retrieval.pixels(len(lengths))
    ids, mask = texts.to_padded(0)
    kv = pair.ours.stack("encoder").image_kv(pair.ours.encode_images(pixels))
    ours = pair.ours.match_logits(texts, torch.arange(len(texts)), kv)
    close(ours, pair.theirs(ids, pixels, attention_mask=mask.long()).itm_score)


def test_matching_gradients(retrieval):
    """Gradients of a loss that reads ITM logits and cosines at once."""
    pair, texts, pixels = retrieval, random_texts([4, 2, 6], CLS), retrieval.pixels(3)
    ids, mask = texts.to_padded(0)
    weights = torch.randn(3, 2), torch.randn(3, 3)
    pair.theirs.zero_grad()
    itm = pair.theirs(ids, pixels, attention_mask=mask.long()).itm_score
    cosines = pair.theirs(ids, pixels, use_itm_head=False, attention_mask=mask.long()).itm_score
    ((itm * weights[0]).sum() + (cosines * weights[1]).sum()).backward()
    pair.ours.zero_grad()
    image_embeds = pair.ours.encode_images(pixels)
    kv = pair.ours.stack("encoder").image_kv(image_embeds)
    itm = pair.ours.match_logits(texts, torch.arange(3), kv)
    cosines = pair.ours.image_features(image_embeds) @ pair.ours.text_features(texts).T
    ((itm * weights[0]).sum() + (cosines * weights[1]).sum()).backward()
    pair.close_gradients()


def lm_loss(logits: Tensor, texts: PackedTexts) -> Tensor:
    """Label-smoothed next-token loss, mean over all tokens but the first of each text."""
    predicts = torch.ones(len(texts.token_ids), dtype=torch.bool)
    predicts[texts.offsets[1:].long() - 1] = False
    return F.cross_entropy(logits[predicts], texts.without_first().token_ids, label_smoothing=0.1)


def test_captioning(captioning, lengths):
    """Logits, smoothed loss, gradients."""
    pair, texts, pixels = captioning, random_texts(lengths, BOS), captioning.pixels(len(lengths))
    ids, mask = texts.to_padded(0)
    pair.theirs.zero_grad()
    theirs = pair.theirs(pixels, ids, mask.long(), labels=ids.masked_fill(~mask, -100))
    theirs.loss.backward()
    pair.ours.zero_grad()
    kv = pair.ours.stack("decoder").image_kv(pair.ours.encode_images(pixels))
    logits = pair.ours.lm_logits(texts, torch.arange(len(texts)), kv)
    close(logits, theirs.logits[mask], what="logits")
    loss = lm_loss(logits, texts)
    close(loss, theirs.loss, what="loss")
    loss.backward()
    pair.close_gradients()


def test_answering(answering, lengths):
    """Question → encoder states → answer decoder: loss and gradients of both stacks.

    transformers 5.23 does not read the cross-attention mask, so its answers would attend to padded question
    tokens, unlike in the published training. So it gets one question at a time here; our model gets all of
    them packed.
    """
    pair, pixels = answering, answering.pixels(len(lengths))
    questions, answers = random_texts(lengths, ENC, seed=1), random_texts(lengths[::-1], BOS, seed=2)
    each, targets = torch.arange(len(lengths)), len(answers.token_ids) - len(answers)
    pair.theirs.zero_grad()
    theirs = torch.zeros(())
    for i in each:
        question, answer = (texts.select(i[None]).token_ids[None] for texts in (questions, answers))
        loss = pair.theirs(question, pixels[i][None], answer, labels=answer).loss
        theirs = theirs + loss * (answer.shape[1] - 1)
    (theirs / targets).backward()
    pair.ours.zero_grad()
    encoder, decoder = pair.ours.stack("encoder"), pair.ours.stack("decoder")
    kv = encoder.image_kv(pair.ours.encode_images(pixels))
    (states,) = encoder([TextStream(questions, "encoder", each)], kv)
    logits = pair.ours.lm_logits(answers, each, decoder.states_kv(states, offsets=questions.offsets))
    loss = lm_loss(logits, answers)
    close(loss, theirs / targets, what="loss")
    loss.backward()
    pair.close_gradients()


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", CLASSES)
def test_written_by_us_read_by_transformers(architecture, size, tmp_path):
    """Bit for bit the same weights and the same config, with no key missing, unexpected or left over."""
    if architecture == "BlipForQuestionAnswering" and size != "equal_widths":
        pytest.skip("transformers' own VQA model works only where image and text are equally wide")
    pair = make_pair(architecture, size, tmp_path / "theirs")
    save_hugging_face(pair.ours, None, tmp_path / "ours")
    theirs, report = type(pair.theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys",
                                             "error_msgs"))
    expected = pair.theirs.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    configs = [model.config.to_dict() for model in (theirs, pair.theirs)]
    assert configs[0]["image_text_hidden_size"] == configs[1]["image_text_hidden_size"]
    for part in ("vision_config", "text_config"):
        ours, original = (config[part] for config in configs)
        differ = {key for key in original if ours.get(key) != original[key]}
        # We name the token that does end a text, and leave the loss to whoever trains.
        assert differ <= {"dtype", "eos_token_id", "label_smoothing"}


def test_processor_of_a_written_directory(tmp_path, bert_vocabulary):
    """transformers finds tokenizer and image processor next to the weights, and they give what ours give."""
    from PIL import Image

    from blip_fast.media.images import evaluation_transform
    from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig

    tokenizer = Tokenizer.from_vocab_file(bert_vocabulary)
    sizes = {"width": 8, "layers": 1, "heads": 1}
    config = BlipConfig(VisionConfig(image_size=32, **sizes), TextConfig(mlp_width=8, **sizes),
                        text_stacks="decoder", contrastive=False, matching=False)
    save_hugging_face(BlipModel(config), tokenizer, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(image, "two dogs, running", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer.encode("two dogs, running")
    torch.testing.assert_close(inputs["pixel_values"], evaluation_transform([image], 32), rtol=0, atol=2e-2)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, transformers.BlipForConditionalGeneration)
    ours, ours_tokenizer = load_model(tmp_path)
    assert ours.config == config
    assert ours_tokenizer is not None and ours_tokenizer.vocab_size == 30524
