"""Training, captions, scores and the server in every precision, on this processor.

`make test-processors` runs these tests again as on processors without AVX-512 (and so without products of
bfloat16 and 8-bit integers) and without AVX2. Only speed may depend on that, not results.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from blip_kernels.cpu import processor
from serving import photos, served
from training_runs import blip_fast_train, drawn_scenes, losses

from blip_fast.checkpoint import save_native
from blip_fast.cli import main
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.captioner import Captioner

pytestmark = pytest.mark.processor
PRECISIONS = ["float32", "bfloat16", "auto"]
STEPS = 20
CAPTIONS = ["a picture of a red ball", "a picture of two dogs", "a picture of a man on a horse",
            "a picture of the blue square", "a picture of people at a long table"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return drawn_scenes(tmp_path_factory.mktemp("scenes"), 6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(len(CAPTIONS))]
    for path, content in zip(paths, photos(len(paths), "PNG"), strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture(scope="module")
def model(pictures, tmp_path_factory) -> Path:
    """A small model that has memorised five pictures' captions, so that none depends on rounding."""
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    config = BlipConfig(
        VisionConfig(32, 16, 64, 2, 2), TextConfig(tokenizer.vocab_size, 64, 2, 2, 128),
        SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id,
                      tokenizer.enc_id),
        embed_dim=32)
    torch.manual_seed(0)
    trained, directory = BlipModel(config), tmp_path_factory.mktemp("model")
    pixels = evaluation_transform([load_image(path) for path in pictures], 32)
    texts = tokenizer.pack(CAPTIONS, "[DEC]")
    ends = texts.offsets[1:] - 1
    # rows that have a next token
    inner = torch.ones(len(texts.token_ids), dtype=torch.bool).index_fill(0, ends.long(), False)
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-3)
    for _ in range(120):
        image_kv = trained.stack("decoder").image_kv(trained.encode_images(pixels))
        logits = trained.lm_logits(texts, torch.arange(len(CAPTIONS)), image_kv)
        loss = torch.nn.functional.cross_entropy(logits[inner], texts.token_ids.roll(-1)[inner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_native(trained, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def in_float32(model, pictures) -> list[str]:
    captions = [said.caption for said in Captioner.from_pretrained(model, dtype="float32")(pictures)]
    assert captions == CAPTIONS
    return captions


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_steps(scenes, tmp_path, precision):
    """The first loss equals that in float32 up to rounding, and the loss falls."""
    short = ["--schedule.max_steps", str(STEPS), "--runtime.save_every", "1000", "--evaluation.images", "0"]
    done = blip_fast_train(scenes, tmp_path, *short, "--runtime.precision", precision)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path)
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for row in found for loss in row)
    # a uniform guess among 200 words, before training
    assert found[0][3] == pytest.approx(math.log(200), rel=0.1)
    assert found[-1][3] < found[0][3] - 0.5


@pytest.mark.parametrize("dtype", [*PRECISIONS, "int8"])
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_in_every_precision(model, pictures, in_float32, capsys, dtype, beams):
    """The demo's last stage with a small model: no caption changes."""
    arguments = ["caption", "--model", str(model), "--json", "--dtype", dtype, "--beams", str(beams)]
    assert main([*arguments, *map(str, pictures)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["caption"] for row in rows] == in_float32


def test_float16_runs_or_is_refused_in_one_sentence(model, pictures, in_float32, capsys):
    status = main(["caption", "--model", str(model), "--json", "--dtype", "float16", *map(str, pictures)])
    out, err = capsys.readouterr()
    if processor.has_float16():
        assert status == 0 and [json.loads(line)["caption"] for line in out.splitlines()] == in_float32
    else:
        assert status == 2 and err.count("\n") == 1 and "float16" in err
        assert processor.has_bfloat16() or "bfloat16" not in err  # a slow dtype is not recommended


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", "int8"])
def test_scores_in_every_precision(model, pictures, in_float32, capsys, dtype):
    def scores(dtype: str) -> torch.Tensor:
        assert main(["score", "--model", str(model), "--json", "--dtype", dtype, str(pictures[0]),
                     *in_float32]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return torch.tensor([[row["itm"], row["itc"]] for row in rows])

    torch.testing.assert_close(scores(dtype), scores("float32"), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", "int8"])
def test_an_index_in_every_precision(model, pictures, in_float32, tmp_path, capsys, dtype):
    """The same pictures with the same scores as in float32. Indexing again is not refused."""
    def found(dtype: str) -> dict[str, list[float]]:
        index = str(tmp_path / dtype)
        for _ in range(2):  # the second time there is nothing new
            assert main(["search", "index", "--index", index, "--model", str(model), "--dtype", dtype,
                         *map(str, pictures)]) == 0
        capsys.readouterr()
        assert main(["search", "query", "--index", index, "--text", in_float32[0], "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {row["image"]: [row["itm"], row["itc"]] for row in rows}

    in_dtype, wanted = found(dtype), found("float32")
    assert in_dtype.keys() == wanted.keys() and len(wanted) == len(pictures)
    for image, figures in wanted.items():
        assert in_dtype[image] == pytest.approx(figures, abs=0.03)


def test_a_served_request(model, pictures, in_float32):
    """In the precision that the server chooses itself."""
    with served("--model", model, "--decoders", 1) as server:
        told = server.caption([path.read_bytes() for path in pictures]).json()
    assert [row["captions"][0]["text"] for row in told["results"]] == in_float32


def test_the_default_precision(model, pictures, in_float32):
    """A precision with products on this processor is chosen, and printed."""
    captioner = Captioner.from_pretrained(model)
    chosen = captioner.model.stack("decoder").word_embeds.weight.dtype
    assert chosen == (torch.bfloat16 if processor.has_bfloat16() else torch.float32)
    assert [said.caption for said in captioner([load_image(path) for path in pictures])] == in_float32
