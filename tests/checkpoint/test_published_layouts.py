"""The `.pth` of NLVR2 and of retrieval, key by key as published: from the file through the commands to the
textbook's outputs.

Twelve text layers, heads 64 wide and BERT's token ids, as in the real files, so no JSON next to the file has
to say what its tensors do not; widths and images are small.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.model import Sizes
from reference.pretraining import TextbookPretraining
from reference.tasks import CLS, ENC, PairReasoner, with_first_token
from torch import Tensor, nn

from blip_fast.checkpoint import load_training_state
from blip_fast.cli import main
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.evaluation import evaluate_retrieval
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.model_loading import load_for_task
from blip_fast.tasks.reasoner import Reasoner

BASE = Sizes(image_size=384)
SMALL = Sizes(image_size=48, vision_width=64, vision_layers=2, vision_heads=1, text_width=64, text_heads=1,
              text_feed_forward=96, positions=64, projection=16)
QUEUE = 12  # published: 57,600
TOLERANCE = 1e-4

# A name for every tensor, its shape in widths: D of the image, W of the text, F of its feed-forward, d of the
# projections, V words, P positions, T visual tokens. `.*` stands for a weight [first, second] and its bias
# [first].
VISION = """cls_token 1,1,D | pos_embed 1,T,D | patch_embed.proj.weight D,3,16,16 | patch_embed.proj.bias D
    norm.weight D | norm.bias D"""
BLOCK = """norm1.weight D | norm1.bias D | norm2.weight D | norm2.bias D | attn.qkv.* 3D,D | attn.proj.* D,D
    mlp.fc1.* 4D,D | mlp.fc2.* D,4D"""
TEXT = """embeddings.word_embeddings.weight V,W | embeddings.position_embeddings.weight P,W
    embeddings.position_ids 1,P | embeddings.LayerNorm.weight W | embeddings.LayerNorm.bias W"""
LAYER = """attention.self.query.* W,W | attention.self.key.* W,W | attention.self.value.* W,W
    attention.output.dense.* W,W | attention.output.LayerNorm.weight W | attention.output.LayerNorm.bias W
    crossattention.output.LayerNorm.weight W | crossattention.output.LayerNorm.bias W
    intermediate.dense.* F,W | output.dense.* W,F | output.LayerNorm.weight W | output.LayerNorm.bias W"""
ONE_IMAGE = """crossattention.self.query.* W,W | crossattention.self.key.* W,D | crossattention.self.value.* W,D
    crossattention.output.dense.* W,W"""
TWO_IMAGES = """crossattention.self0.query.* W,W | crossattention.self0.key.* W,D | crossattention.self0.value.* W,D
    crossattention.self1.query.* W,W | crossattention.self1.key.* W,D | crossattention.self1.value.* W,D
    crossattention.output.dense0.* W,W | crossattention.output.dense1.* W,W"""
MERGED = "crossattention.output.merge_layer.* W,2W"  # from the seventh layer on


def listed(names: str, prefix: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width = {"D": sizes.vision_width, "W": sizes.text_width, "F": sizes.text_feed_forward,
             "d": sizes.projection,
             "V": sizes.vocabulary, "P": sizes.positions, "T": (sizes.image_size // 16) ** 2 + 1}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in names.replace("\n", "|").split("|"):
        name, axes = entry.split()
        shape = tuple(int(axis) if axis.isdigit() else int(axis[:-1] or 1) * width[axis[-1]]
                      for axis in axes.split(","))
        if name.endswith(".*"):
            shapes |= {prefix + name[:-1] + "weight": shape, prefix + name[:-1] + "bias": shape[:1]}
        else:
            shapes[prefix + name] = shape
    return shapes


def encoders(sizes: Sizes, cross: str, momentum: str = "") -> dict[str, tuple[int, ...]]:
    vision, text = f"visual_encoder{momentum}.", f"text_encoder{momentum}."
    shapes = listed(VISION, vision, sizes) | listed(TEXT, text, sizes)
    for i in range(sizes.vision_layers):
        shapes |= listed(BLOCK, f"{vision}blocks.{i}.", sizes)
    for i in range(sizes.text_layers):
        merged = f" | {MERGED}" if cross == TWO_IMAGES and i >= 6 else ""
        shapes |= listed(f"{LAYER} | {cross}{merged}", f"{text}encoder.layer.{i}.", sizes)
    return shapes


def nlvr2_keys(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    head = "cls_head.0.* W,W | cls_head.2.weight 2,W | cls_head.2.bias 2"
    return encoders(sizes, TWO_IMAGES) | listed(head, "", sizes)


def retrieval_keys(sizes: Sizes, queue: int) -> dict[str, tuple[int, ...]]:
    projections = "vision_proj{0}.* d,D | text_proj{0}.* d,W"
    return (encoders(sizes, ONE_IMAGE) | encoders(sizes, ONE_IMAGE, "_m")
            | listed(f"{projections.format('')} | {projections.format('_m')} | itm_head.weight 2,W | "
                     f"itm_head.bias 2 | image_queue d,{queue} | text_queue d,{queue} | idx_queue 1,{queue} "
                     "| ptr_queue 1", "", sizes)
            | {"temp": ()})


@pytest.mark.parametrize("sizes", [BASE, SMALL], ids=["base", "small"])
def test_the_textbook_has_the_published_keys(sizes):
    """Every key and shape that the published classes have, and no other."""
    with torch.device("meta"):
        models = (PairReasoner(sizes), nlvr2_keys(sizes)), (retrieval(sizes, QUEUE),
                                                            retrieval_keys(sizes, QUEUE))
    for model, expected in models:
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def retrieval(sizes: Sizes, queue: int) -> TextbookPretraining:
    return TextbookPretraining(sizes, queue_length=queue, decoder=False, retrieval=True)


def randomised(model: nn.Module) -> nn.Module:
    """Noise on every parameter, momentum copies included, which then differ from what they follow."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model: nn.Module, path: Path) -> Path:
    """As the published fine-tuning loops save: the model with optimiser, recipe and epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "config": {"vit": "base", "image_size": 384, "queue_size": QUEUE}, "epoch": 5}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six pictures, and bert-base-uncased's vocabulary but for its words: special tokens have BERT's ids."""
    folder = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    words = [f"word{i}" for i in range(30522)]
    words[0], words[100], words[101], words[102], words[103] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return folder


def pixels(folder: Path, names: list[str]) -> Tensor:
    return evaluation_transform([load_image(folder / name) for name in names], SMALL.image_size)


def padded(folder: Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [texts, longest] that the textbook reads."""
    ids, mask = Tokenizer.from_pretrained(folder / "vocab.txt").pack(texts).to_padded(0)
    return ids, mask.long()


def evaluate(capsys, task: str, model: Path, data: Path, *options: str) -> dict:
    assert main(["evaluate", task, "--dtype", "float32", "--model", str(model), "--data", str(data), *options,
                 "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def convert(path: Path, folder: Path, destination: Path) -> Path:
    assert main(["convert", "--to", "native", "--tokenizer", str(folder / "vocab.txt"), str(path),
                 str(destination)]) == 0
    return destination


# ---------------------------------------------------------------- NLVR2

PAIRS = [(0, 1, "word7 word8 word900"), (2, 3, "word7"), (1, 0, "word7 word8 word900"),
         (4, 5, "word30000 word5 word6"),
         (5, 5, "word12 word13 word14 word15"), (3, 0, "word7 word16 word17")]


@pytest.fixture(scope="module")
def nlvr2(folder) -> tuple[Path, Tensor]:
    """An NLVR2 checkpoint, and the textbook's logits (false, true) [pairs, 2]."""
    torch.manual_seed(0)
    textbook = randomised(PairReasoner(SMALL))
    left, right = (pixels(folder, [f"{pair[eye]}.png" for pair in PAIRS]) for eye in (0, 1))
    with torch.no_grad():
        logits = textbook(left, right, *padded(folder, [sentence for *_, sentence in PAIRS]))
        # Both answers occur: the head's bias puts the threshold between the third and the fourth of these
        # pairs.
        margins = (logits[:, 1] - logits[:, 0]).sort().values
        textbook.cls_head[2].bias[1] -= (margins[2] + margins[3]) / 2
        logits = textbook(left, right, *padded(folder, [sentence for *_, sentence in PAIRS]))
    margins = logits[:, 1] - logits[:, 0]
    assert (margins > 0).sum() == 3 and margins.abs().min() > 10 * TOLERANCE
    return save(textbook, folder / "nlvr2.pth"), logits


def test_nlvr2(nlvr2, folder, tmp_path, capsys):
    """Probabilities, logits and what `evaluate` prints, of the file and of what `convert` makes of it."""
    path, expected = nlvr2
    labels = [True, False, True, True, False, False]
    rows = [{"image": str(folder / f"{a}.png"), "second_image": str(folder / f"{b}.png"), "caption": sentence,
             "label": label} for (a, b, sentence), label in zip(PAIRS, labels, strict=True)]
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = [bool(true > false) == label for (false, true), label in zip(expected, labels, strict=True)]
    converted = convert(path, folder, tmp_path / "native")
    capsys.readouterr()
    for model, options in ((path, ("--tokenizer", str(folder / "vocab.txt"))), (converted, ())):
        reasoner = Reasoner.from_pretrained(model, tokenizer=options[1] if options else None, dtype="float32")
        found = reasoner([(folder / f"{a}.png", folder / f"{b}.png") for a, b, _ in PAIRS],
                         [s for *_, s in PAIRS])
        torch.testing.assert_close(found, expected.softmax(dim=1)[:, 1], rtol=0, atol=TOLERANCE)
        said = evaluate(capsys, "nlvr2", model, tmp_path, *options)
        assert said["accuracy"] == pytest.approx(sum(right) / 6)


@torch.no_grad()
def test_nlvr2_logits(nlvr2, folder):
    path, expected = nlvr2
    model, tokenizer = load_for_task(path, tokenizer=folder / "vocab.txt", differentiable=True,
                                     dtype="float32")
    embeds = [model.encode_images(pixels(folder, [f"{pair[eye]}.png" for pair in PAIRS])) for eye in (0, 1)]
    logits = model.pair_logits(torch.stack(embeds, dim=1), tokenizer.pack([s for *_, s in PAIRS], "[ENC]"))
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    swapped = model.pair_logits(torch.stack(embeds[::-1], dim=1),
                                tokenizer.pack([s for *_, s in PAIRS], "[ENC]"))
    changed = (swapped - expected).abs().amax(dim=1)
    assert changed[[0, 1, 2, 3, 5]].min() > 10 * TOLERANCE, "each eye has weights of its own"


# ---------------------------------------------------------------- retrieval

CAPTIONS = [["word1 word2 word3", "word2"], ["word900 word12 word4 word5"], ["word6 word7"],
            ["word8", "word9 word1"], ["word29999 word10"], ["word11 word2 word3"]]


@pytest.fixture(scope="module")
def trained(folder) -> tuple[Path, TextbookPretraining]:
    """A retrieval checkpoint whose queues were written to, and the textbook model."""
    torch.manual_seed(1)
    textbook = randomised(retrieval(SMALL, QUEUE))
    with torch.no_grad():
        textbook.temp.fill_(0.0413)
    features = [nn.functional.normalize(torch.randn(5, SMALL.projection), dim=1) for _ in range(2)]
    textbook.enqueue(*features, torch.tensor([7, 7, 8, 9, 30]))
    return save(textbook, folder / "retrieval.pth"), textbook


@torch.no_grad()
def table(textbook: TextbookPretraining, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(ITM logits [images, texts, 2] with [ENC] first, the same with [CLS] first, cosines [images, texts]),
    image by image."""
    ids, mask = padded(folder, [text for texts in CAPTIONS for text in texts])
    embeds = textbook.visual_encoder(pixels(folder, [f"{i}.png" for i in range(6)]))
    cosines = textbook.image_features(embeds) @ textbook.text_features(with_first_token(ids, CLS), mask).T
    seen = [image.expand(len(ids), -1, -1) for image in embeds]
    enc, cls = (torch.stack([textbook.matching_logits(image, with_first_token(ids, first), mask)
                             for image in seen])
                for first in (ENC, CLS))
    return enc, cls, cosines


def test_retrieval(trained, folder, tmp_path, capsys):
    """Scores of both directions, and the recalls that `evaluate` prints."""
    path, textbook = trained
    enc, _, cosines = table(textbook, folder)
    scores = enc[:, :, 1] + cosines
    rows = [{"image": str(folder / f"{i}.png"), "captions": texts} for i, texts in enumerate(CAPTIONS)]
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image_of_text = [i for i, texts in enumerate(CAPTIONS) for _ in texts]
    best_text = [scores[i].argmax().item() for i in range(6)]
    r1 = {"i2t_r1": sum(image_of_text[text] == i for i, text in enumerate(best_text)) / 6,
          "t2i_r1": sum(scores[:, j].argmax().item() == i for j, i in enumerate(image_of_text))
          / len(image_of_text)}
    converted = convert(path, folder, tmp_path / "native")
    capsys.readouterr()
    for model, options in ((path, ("--tokenizer", str(folder / "vocab.txt"))), (converted, ())):
        loaded = load_for_task(model, tokenizer=options[1] if options else None, dtype="float32")
        found, _ = evaluate_retrieval(*loaded, annotated_images(tmp_path, None))
        assert found.image_to_text is not None
        torch.testing.assert_close(found.image_to_text.dense(), scores, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found.text_to_image.dense(), scores.T, rtol=0, atol=TOLERANCE)
        said = evaluate(capsys, "retrieval", model, tmp_path, *options)
        assert {name: said[name] for name in r1} == pytest.approx(r1)


@pytest.mark.parametrize("first_token", ["[ENC]", "[CLS]"])
def test_matching(trained, folder, first_token):
    """What `score` computes: probabilities with either first token, and cosines."""
    path, textbook = trained
    enc, cls, cosines = table(textbook, folder)
    matcher = Matcher.from_pretrained(path, tokenizer=folder / "vocab.txt", dtype="float32")
    found = matcher.score([folder / f"{i}.png" for i in range(6)],
                          [text for texts in CAPTIONS for text in texts], first_token=first_token)
    expected = (enc if first_token == "[ENC]" else cls).softmax(dim=-1)[:, :, 1]
    torch.testing.assert_close(found.itm, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.itc, cosines, rtol=0, atol=TOLERANCE)
    assert matcher.model.temperature.item() == pytest.approx(0.0413)


def test_retrieval_training_state(trained, folder, tmp_path):
    """Queues, their ids and pointer and all momentum copies, from the file and through `convert`, bit for
    bit."""
    path, textbook = trained
    expected = {name: tensor for name, tensor in textbook.state_dict().items()
                if "queue" in name or name.split(".")[0].endswith("_m")}
    assert expected["ptr_queue"].item() == 5
    assert expected["idx_queue"][0, :6].tolist() == [7, 7, 8, 9, 30, -100]
    model, _ = load_for_task(path, tokenizer=folder / "vocab.txt", differentiable=True, dtype="float32")
    for source in (path, convert(path, folder, tmp_path / "native")):
        found = load_training_state(source, model.config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
