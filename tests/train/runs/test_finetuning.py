"""Fine-tuning as a user does it: each recipe's published values, and a tiny run of each task from a
pre-training checkpoint to a model that the task's own class answers with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blip_train.prepare import prepare_step, with_tokenizer
from blip_train.recipe import load_recipe
from hf_models import small_tokenizer
from safetensors.torch import load_file
from training_runs import blip_fast_train

from blip_fast.checkpoint import load_model, save_native
from blip_fast.cli import main
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.vision import resize_positions
from blip_fast.scenes.scenes import write_scenes
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.dialog_ranking import DialogRanker, Dialogue, Round
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.reasoner import Reasoner

RECIPES = Path(__file__).parents[3] / "train" / "blip_train" / "recipes"
SIZE = 48  # of the pictures; the checkpoint's is 32
TINY = ["--model.vision.image_size", str(SIZE), "--runtime.batch_size", "3", "--runtime.precision", "float32",
        "--runtime.log_every", "1", "--schedule.max_steps", "2", "--schedule.lr", "1e-3", "--data.threads",
        "1", "--data.train_split", "null"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A pre-training checkpoint, tied, whose images are not as wide as its texts."""
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = BlipConfig(VisionConfig(image_size=32, width=48, layers=2, heads=2),
                        TextConfig(width=32, layers=7, heads=2, mlp_width=64, max_positions=64), embed_dim=16)
    folder = tmp_path_factory.mktemp("start")
    save_native(BlipModel(with_tokenizer(config, tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, write_scenes(folder, 12, "train", seed=0, noise=0.0, image_size=SIZE)


@pytest.fixture
def tune(start, pictures, tmp_path):
    """Run a recipe on the given rows; its run's directory."""
    def run(recipe: str, rows: list[dict], *options: str) -> Path:
        (pictures[0] / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (pictures[0] / "recipe.yaml").write_text((RECIPES / f"{recipe}.yaml").read_text())
        ranks = [] if "--runtime.ranks" in options else ["--runtime.ranks", "1"]
        done = blip_fast_train(pictures[0], tmp_path, "--init", str(start), *TINY, *ranks, *options)
        assert done.returncode == 0, done.stderr
        return tmp_path / recipe
    return run


def logged(run: Path, loss: str) -> list[float]:
    return [json.loads(line)[loss] for line in (run / "log.jsonl").read_text().splitlines()]


def test_captioning(tune, pictures):
    run = tune("caption_coco", pictures[1])
    assert all(value > 0 for value in logged(run, "lm"))
    captioner = Captioner.from_pretrained(run / "model", dtype="float32")
    assert captioner.model.config.text_stacks == "decoder"
    assert captioner([pictures[0] / "000000.png"])[0].caption.startswith("a picture of")


def test_retrieval_with_adapters(tune, pictures, start):
    """The run changes only what its adapters add: the exported model is the initial
    one with the adapters merged."""
    from peft import PeftModel

    run = tune("retrieval_coco", pictures[1], "--adapters.rank", "2", "--objective.queue_size", "8")
    assert all(value > 0 for loss in ("itc", "itm") for value in logged(run, loss))
    before, _ = load_model(start, image_size=SIZE)
    before = before.restricted_to(replace(before.config, text_stacks="encoder"))
    first, exported = before.state_dict(), load_file(run / "model" / "model.safetensors")
    changed = {name for name in exported if not torch.equal(exported[name], first[name])}
    assert changed == {name for name in exported if name.endswith(("qkv.weight", "query.0.weight"))}
    matcher = Matcher.from_pretrained(run / "model", dtype="float32")
    image, text = [pictures[0] / "000001.png"], ["a red ball on a table"]
    scores = matcher.score(image, text)
    loaded = PeftModel.from_pretrained(before, str(run / "adapters"))
    again = Matcher(loaded.base_model.model.eval(), matcher.tokenizer).score(image, text)
    torch.testing.assert_close(again.itm, scores.itm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.itc, scores.itc, rtol=1e-5, atol=1e-6)
    assert_exported_alike(run)


def test_answering_on_two_ranks(tune, pictures, start):
    """Two questions about one picture are two samples. Frozen weights are bit-identical after ZeRO 2."""
    rows = [{"image": row["image"], "question": question, "answers": answers} for row in pictures[1]
            for question, answers in (("what is left of the table?", ["a horse", "a horse", "horse"]),
                                      ("is this a dog?", {"no": 0.2}))]
    run = tune("vqa", rows, "--runtime.ranks", "2", "--runtime.zero_stage", "2",
               "--optimizer.frozen=[vision.blocks,text.encoder.layers.0-3,text.*.word_embeds]")
    assert all(value > 0 for value in logged(run, "answer"))
    answerer = Answerer.from_pretrained(run / "model", dtype="float32")
    answer, = answerer([pictures[0] / "000000.png"], ["what is this?"], first_token="[ENC]")
    assert answer.token_ids[0] == answerer.tokenizer.bos_id
    tied, exported = load_file(start / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    same = {name for name, tensor in exported.items()
            if torch.equal(tensor, tied.get(_tied(name), torch.empty(0)))}
    prefixes = ("vision.blocks.",
                *(f"text.encoder.layers.{i}." for i in range(4)), "text.encoder.word_embeds",
                "text.decoder.word_embeds")
    assert same == {name for name in exported if name.startswith(prefixes)}
    assert len(list((run / "shards" / "data").glob("*.tar"))) == 1 and json.loads(
        (run / "shards" / "data" / "shards.json").read_text())["samples"] == 24
    assert_exported_alike(run)


def assert_exported_alike(run: Path) -> None:
    """`blip-fast export` of the last checkpoint equals what the run itself has exported."""
    assert main(["export", str(run), str(run / "again")]) == 0
    ours, own = (load_file(run / name / "model.safetensors") for name in ("again", "model"))
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)


def _tied(name: str) -> str:
    return name.replace("text.encoder.", "text.tied.").replace("text.decoder.", "text.tied.")


def test_reasoning(tune, pictures):
    names = [row["image"] for row in pictures[1]]
    rows = [{"image": left, "second_image": right, "caption": "both show a ball", "label": left < right}
            for left, right in zip(names, names[::-1], strict=True)]
    run = tune("nlvr2", rows, "--tokenizer.max_tokens", "64")
    assert all(value > 0 for value in logged(run, "reasoning"))
    assert_exported_alike(run)
    reasoner = Reasoner.from_pretrained(run / "model", dtype="float32")
    pair = (pictures[0] / "000000.png", pictures[0] / "000001.png")
    one, other, again = reasoner([pair, pair[::-1], pair],
                                 ["Both show a ball.", "both show a ball", "a dog"]).tolist()
    assert one != other and 0 < one < 1 and again != one
    assert reasoner([pair], ["both show a ball"]).tolist() == pytest.approx([one])


def test_dialogues(tune, pictures, tmp_path):
    """From a checkpoint whose images are as wide as its texts; another is refused."""
    rounds = [{"question": "what is it?", "answer": "a ball",
               "candidates": ["a dog", "a ball", "two", "red", "blue"],
               "right": 1}, {"question": "is it red?", "answer": "no"}]
    rows = [{**row, "dialog": rounds} for row in pictures[1]]
    with pytest.raises(AssertionError, match="images are 48 wide and its texts 32"):
        tune("scenes_visdial", rows, "--data.root", str(pictures[0]))
    tokenizer = small_tokenizer()
    config = BlipConfig(VisionConfig(image_size=32, width=32, layers=2, heads=2),
                        TextConfig(width=32, layers=2, heads=2, mlp_width=64, max_positions=64), embed_dim=16)
    save_native(BlipModel(with_tokenizer(config, tokenizer)), tokenizer, tmp_path / "even")
    run = tune("scenes_visdial", rows, "--data.root", str(pictures[0]), "--init", str(tmp_path / "even"),
               "--runs", str(tmp_path / "runs"))
    run = tmp_path / "runs" / run.name
    assert all(value > 0 for value in logged(run, "dialogue"))
    assert_exported_alike(run)
    ranker = DialogRanker.from_pretrained(run / "model", dtype="float32")
    dialogue = Dialogue("a ball", [Round("what is it?", "a ball", ["a dog", "a ball"])])
    (scores,) = ranker(pictures[0] / "000000.png", dialogue)
    assert scores[0] != scores[1]


def test_the_start_of_vqa_is_the_checkpoint(start):
    """Both untied stacks start as the tied one. The decoder's keys and values, which now read text, are
    initialised anew, because the published code drops what does not fit. Positions are resized."""
    recipe = load_recipe(RECIPES / "vqa.yaml", ["--init", str(start), "--model.vision.image_size", str(SIZE)])
    tied = load_model(start)[0].state_dict()
    model = prepare_step(recipe, small_tokenizer()).model
    anew = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, tied[_tied(name)])}
    assert anew == {"text.decoder.image_to_kv.0.weight", "vision.position_embeds"}
    expected = resize_positions(tied["vision.position_embeds"], 10)
    torch.testing.assert_close(model.vision.position_embeds, expected, rtol=0, atol=0)


def test_adapters_refuse_a_start_that_lacks_weights(start):
    for name in ("vqa", "nlvr2"):
        recipe = load_recipe(RECIPES / f"{name}.yaml", ["--init", str(start), "--adapters.rank", "2"])
        with pytest.raises(ValueError, match="which would start anew but not be trained together with adapters"):
            prepare_step(recipe, small_tokenizer())


PUBLISHED = {  # pixels, lr, pairs of a global batch, epochs over pairs, max tokens, losses
    "caption_coco": (384, 1e-5, 256, 5, 40, ("lm",)),
    "retrieval_coco": (384, 1e-5, 256, 6, 35, ("itc", "itm")),
    "retrieval_flickr30k": (384, 1e-5, 256, 6, 35, ("itc", "itm")),
    "vqa": (480, 2e-5, 256, 10, 35, ("answer",)),
    "nlvr2": (384, 3e-5, 256, 15, 512, ("reasoning",)),
    # lr, batch and epochs are not confirmed: see the recipe
    "visdial": (384, 2e-5, 240, 20, 512, ("dialogue",)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_describe_the_published_fine_tuning(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    pixels, lr, batch, epochs, max_tokens, losses = PUBLISHED[name]
    assert (recipe.name, recipe.model.vision.image_size, recipe.schedule.lr, recipe.objective.losses) == (
        name, pixels, lr, losses)
    assert recipe.runtime.ranks * recipe.runtime.batch_size * recipe.runtime.accumulation == batch
    # An epoch reads one of an image's captions.
    captions = 5 if name.split("_")[0] in ("caption", "retrieval") else 1
    assert recipe.schedule.epochs == epochs * captions
    assert (recipe.schedule.kind, recipe.schedule.min_lr, recipe.schedule.warmup_steps) == ("cosine", 0.0, 0)
    assert (recipe.tokenizer.max_tokens, recipe.optimizer.weight_decay) == (max_tokens, 0.05)
    data = recipe.data
    assert (data.crop_scale, data.flip, data.rand_augment) == ((0.5, 1.0), True, True)
    assert recipe.objective.label_smoothing == 0.1


def test_recipes_of_retrieval_and_captioning():
    coco, flickr = (load_recipe(RECIPES / f"retrieval_{name}.yaml").objective
                    for name in ("coco", "flickr30k"))
    assert (coco.positives, coco.negatives, coco.negative_floor, coco.queue_size) == ("id", "all_ranks", 0.0,
                                                                                      57600)
    assert flickr == replace(coco, negatives="local")
    captioning = load_recipe(RECIPES / "caption_coco.yaml")
    assert (captioning.data.prompt, captioning.objective.prompt_tokens) == ("a picture of ", 4)


@pytest.mark.parametrize(("options", "message"), [
    (["--objective.losses=[answer,lm]"], "answer, reasoning or dialogue alone"),
    (["--objective.losses=[answer]"], "answer, which needs a model with text_stacks: untied"),
    (["--objective.losses=[reasoning]"], "needs a model with reasoning: true and text.twin_cross_attention: "
                                         "true"),
    (["--objective.losses=[dialogue]"], "dialogue, which needs a model with matching: true"),
    (["--adapters.rank=0"], "adapters.rank and alpha must be at least 1"),
])
def test_a_recipe_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / "caption_coco.yaml", options)
