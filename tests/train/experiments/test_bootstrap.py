"""`blip-fast bootstrap`: a small loop, interrupted and resumed; its figures recounted; bad recipes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest
import yaml
from blip_train.commands.bootstrap import COMMAND
from blip_train.experiments import bootstrap as loops
from blip_train.experiments.bootstrap_recipe import BootstrapRecipe, plan
from blip_train.experiments.bootstrap_report import comparison, removal, summary
from blip_train.recipe import read_recipe
from jsonargparse import ArgumentParser
from patience import PATIENCE, until
from training_runs import RECIPE

from blip_fast.data.shards.annotated import annotated_images
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import iterate
from blip_fast.evaluation import evaluate_captions
from blip_fast.generate import GenerationConfig
from blip_fast.scenes.scenes import caption, scene_from_slots, write_scenes
from blip_fast.tasks.captioner import Captioner

pq = pytest.importorskip("pyarrow.parquet", reason="CapFilt needs the extra `capfilt`")
pytest.importorskip("nvidia.dali", reason="training needs the extra `train`")

RECIPES = Path(__file__).parents[3] / "train" / "blip_train" / "recipes"
DECODER = {"objective.losses": ["lm"], "model.text_stacks": "decoder", "model.contrastive": False,
           "model.matching": False}
LOOP = {
    "name": "loop",
    "scenes": {"web": 40, "noise": 0.5, "human": 16, "calibration": 6, "test": 5, "image_size": 32},
    "web": ["web"],
    "pretrain": {"recipe": "tiny.yaml", "overrides": {"schedule.max_steps": 4, "data.sources": [
        {"name": "web", "root": "{scenes}/web", "weight": 3},
        {"name": "human", "root": "{scenes}/human", "weight": 1}]}},
    "captioner": {"recipe": "tiny.yaml",
                  "overrides": {"data.root": "{scenes}/human", "schedule.max_steps": 2, **DECODER}},
    "filter": {"recipe": "tiny.yaml", "overrides": {"data.root": "{scenes}/human", "schedule.max_steps": 2}},
    "capfilt": {"max-length": 8},
    "calibration": {"data": "{scenes}/calibration", "keep": 0.5},
    "test": "{scenes}/test",
}


def recipe_file(folder: Path, **changes) -> Path:
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "bootstrap.yaml").write_text(yaml.safe_dump({**LOOP, **changes}))
    return folder / "bootstrap.yaml"


def parse(*arguments: object):
    parser = ArgumentParser(exit_on_error=False)
    COMMAND.arguments(parser)
    return parser.parse_args(["--config", *map(str, arguments)])


def recipe_of(*arguments: object) -> BootstrapRecipe:
    return read_recipe(parse(*arguments), BootstrapRecipe)


class Killed(BaseException):
    """Ends the process as SIGKILL would: nothing catches it."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A loop that was killed before CapFilt and resumed: its folder, and the commands of both attempts."""
    folder = tmp_path_factory.mktemp("bootstrap")
    attempts, really = [], loops._command

    def command(*arguments: str) -> None:
        if arguments[0] == "capfilt" and len(attempts) == 1:
            raise Killed
        attempts[-1].append((arguments[0], Path(arguments[2]).parent.name))
        really(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RANK", raising=False)  # tests of the engine leave it
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(loops, "_command", command)
        recipe_file(folder)
        attempts.append([])
        with pytest.raises(Killed):
            COMMAND.run(parse("bootstrap.yaml"))
        attempts.append([])
        COMMAND.run(parse("bootstrap.yaml", "--resume"))
        patch.setattr(loops, "_command", really)
        yield folder / "runs" / "loop", attempts


def figures_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_a_killed_loop_goes_on_with_the_stage_that_was_cut_short(finished):
    run, (first, second) = finished
    assert first == [("train", "pretrain"), ("train", "captioner"), ("train", "filter")]
    assert [name for name, _ in second] == ["capfilt", "train"]
    assert second[1] == ("train", "bootstrapped")
    assert {"metrics.json", "report.html", "bootstrap.yaml", "seed-0"} == {path.name
                                                                           for path in run.iterdir()}
    assert "whole captions right" in (run / "report.html").read_text()


def test_both_pre_trainings_differ_in_the_web_pairs_alone(finished):
    seed = finished[0] / "seed-0"
    raw, cleaned = (yaml.safe_load((seed / stage / "recipe.yaml").read_text())
                    for stage in ("pretrain", "bootstrapped"))
    assert cleaned["data"]["sources"] == [
        {"name": "web", "root": "runs/loop/seed-0/cleaned/web", "weight": 3.0},
        {"name": "human", "root": "runs/loop/seed-0/scenes/human", "weight": 1.0}]
    cleaned["data"]["sources"][0]["root"] = raw["data"]["sources"][0]["root"]
    assert cleaned == {**raw, "name": "bootstrapped"}
    assert raw["init"] is None
    for stage in ("captioner", "filter"):
        assert yaml.safe_load((seed / stage / "recipe.yaml").read_text())["init"] == "runs/loop/seed-0/pretrain/model"


def test_figures_equal_counting_again(finished):
    """Removal is recounted from the index of texts and the drawn truth, right
    texts by regenerating captions."""
    run, _ = finished
    seed, figures = run / "seed-0", figures_of(run)["seeds"]["0"]
    truth = {sample.record["image"]: sample.record for sample in iterate(seed / "scenes" / "web")}
    assert sum(not record["caption_is_right"] for record in truth.values()) == 20
    rows = pq.read_table(seed / "cleaned" / "web" / "texts").to_pylist()
    removed = {row["image"] for row in rows if row["origin"] == "web" and not row["kept"]}
    wrong = {name for name, record in truth.items() if not record["caption_is_right"]}
    assert 0 < len(removed) < len(truth)
    assert figures["removal_precision"] == len(removed & wrong) / len(removed)
    assert figures["removal_recall"] == len(removed & wrong) / len(wrong)
    assert figures["right_raw"] == 0.5

    def right(row):
        scene = scene_from_slots(truth[row["image"]]["scene"])
        return row["text"] in (caption(scene), caption(scene.turned()))

    kept = [row for row in rows if row["kept"]]
    assert figures["right_cleaned"] == pytest.approx(sum(map(right, kept)) / len(kept))


def test_each_model_is_measured_under_its_own_name(finished):
    run, _ = finished
    figures, images = figures_of(run)["seeds"]["0"], annotated_images(run / "seed-0" / "scenes" / "test",
                                                                      "test")
    assert len(images) == 5
    for name, stage in (("raw", "pretrain"), ("cleaned", "bootstrapped")):
        captioner = Captioner.from_pretrained(run / "seed-0" / stage / "model", dtype="float32")
        found = evaluate_captions(captioner, images, GenerationConfig(beams=3, max_length=24, min_length=5),
                                  prompt="")
        assert figures[f"{name}_caption_loss"] == pytest.approx(found.loss)
        assert figures[f"{name}_slot_accuracy"] == found.slots.slot_accuracy
    assert figures["raw_caption_loss"] != figures["cleaned_caption_loss"]
    assert figures["chance_i2t_r1"] == pytest.approx(1 / 5)


def test_stages_done_again_give_the_same_bytes(finished):
    """CapFilt is interrupted, and a training is killed before its first checkpoint."""
    run, _ = finished
    seed, before = run / "seed-0", (run / "metrics.json").read_bytes()
    results = [seed / "bootstrapped" / "model" / "model.safetensors", seed / "cleaned" / "web" / "000000.tar",
               seed / "pretrain" / "model" / "model.safetensors"]
    contents, untouched = [path.read_bytes() for path in results], results[2].stat().st_mtime_ns
    shutil.rmtree(seed / "bootstrapped")
    shutil.rmtree(seed / "cleaned" / "web")
    (seed / "bootstrapped" / "shards").mkdir(parents=True)
    (seed / "bootstrapped" / "log.jsonl").write_text("{}\n")
    COMMAND.run(parse("bootstrap.yaml", "--resume"))
    assert [path.read_bytes() for path in results] == contents
    assert results[2].stat().st_mtime_ns == untouched
    assert (run / "metrics.json").read_bytes() == before


def test_a_finished_loop_is_not_begun_again(finished, monkeypatch, capsys):
    run, _ = finished
    monkeypatch.setattr(loops, "_command", lambda *arguments: calls.append(arguments[0]))
    monkeypatch.setattr(loops, "measure", lambda loop: pytest.fail("measured again"))
    calls: list[str] = []
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        COMMAND.run(parse("bootstrap.yaml"))
    with pytest.raises(ValueError, match=r"filter was begun with another recipe \(schedule changed\)"):
        changed = {"recipe": "tiny.yaml",
                   "overrides": {**LOOP["filter"]["overrides"], "schedule.max_steps": 3}}
        recipe_file(run.parents[1], filter=changed)
        COMMAND.run(parse("bootstrap.yaml", "--resume"))
    with pytest.raises(ValueError, match="holds other scenes"):
        recipe_file(run.parents[1], scenes={**LOOP["scenes"], "noise": 0.4})
        COMMAND.run(parse("bootstrap.yaml", "--resume"))
    assert not calls
    recipe_file(run.parents[1])
    COMMAND.run(parse("bootstrap.yaml", "--resume", "--json"))
    assert json.loads(capsys.readouterr().out) == figures_of(run)
    assert set(calls) <= {"capfilt"}  # which itself knows that its shards are done


def test_a_stage_that_fails_ends_the_loop_with_its_status(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        loops._command("train", "--config", "nowhere.yaml")
    assert ended.value.code == 2
    assert "nowhere.yaml" in capfd.readouterr().err


def test_sigterm_is_handed_on_to_the_stage(tmp_path):
    """A stand-in for Python that prints when it starts, and by which signal it was asked to end."""
    stage = tmp_path / "stage"
    stage.write_text("#!/bin/sh\ntrap 'echo asked > asked; exit 143' TERM\necho $@ > begun\n"
                     "while :; do sleep 0.1; done\n")
    stage.chmod(0o755)
    code = ("import sys; from blip_train.experiments import bootstrap; "
            f"sys.executable = {str(stage)!r}; bootstrap._command('train')")
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as process:
        until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
    assert (tmp_path / "begun").read_text() == "-m blip_fast train\n"
    assert (tmp_path / "asked").exists()


# ---------------------------------------------------------------- recipes


def changed(stage: str, **overrides):
    return {stage: {"recipe": "tiny.yaml", "overrides": {**LOOP[stage]["overrides"],
                                                         **{k.replace("__", "."): v
                                                            for k, v in overrides.items()}}}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"web": ["cc12m"]}, "web names cc12m, which is no source of the pre-training: its data.sources are web, "
                         "human"),
    ({"web": []}, r"web is \[\]: name the sources"),
    ({"seeds": [1, 1]}, r"seeds are \[1, 1\]"),
    ({"filter": {"recipe": "nowhere.yaml"}}, "filter: nowhere.yaml is neither a file nor a recipe of "
                                             "blip_train"),
    (changed("filter", schedule__learning_rate=1), "filter: recipe .*schedule.learning_rate"),
    (changed("captioner", init="models/other"), "captioner: init is set by the loop itself"),
    (changed("pretrain", seed=3), "pretrain: seed is set by the loop itself"),
    (changed("captioner", objective__losses=["itc", "itm"], model__text_stacks="tied",
             model__contrastive=True, model__matching=True), "captioner: objective.losses lacks lm"),
    (changed("filter", model__vision__image_size=48), "different model.vision.image_size"),
    ({"calibration": None, "capfilt": {"threshold": 1.5}}, "capfilt: threshold is 1.5"),
    ({"capfilt": {"threshold": 0.5}}, "capfilt.threshold and calibration both set"),
    ({"capfilt": {"colour": "red"}}, "capfilt: .*colour"),
    ({"capfilt": {"output": "there"}}, "capfilt: output is set by the loop itself"),
    ({"calibration": {"data": "x", "keep": 0}}, "calibration.keep is 0"),
    ({"scenes": {**LOOP["scenes"], "noise": 0.0}}, "there must be right and wrong ones"),
    ({"pre_train": {"recipe": "tiny.yaml"}}, "pre_train"),
    ({"seeds": ["a"]}, "seeds"),
    ({"scenes": None}, r"\{scenes\} stands in a path, but no scenes are to be drawn"),
])
def test_a_bad_recipe_is_named_before_anything_starts(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    recipe_file(tmp_path, **changes)
    # Errors that the command line prints in one line.
    with pytest.raises((ValueError, OSError, ArgumentError), match=message):
        COMMAND.run(parse("bootstrap.yaml"))
    assert not (tmp_path / "runs").exists()


def test_a_loop_over_data_of_ones_own(tmp_path, monkeypatch):
    """Two packed web sources and a folder. What is missing is named, one after
    another, until all is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    write_scenes(tmp_path / "coco", 8, "train", seed=0, noise=0.0, image_size=32)
    sources = [{"name": "cc", "root": "cc"}, {"name": "coco", "root": "coco"}, {"name": "sbu", "root": "sbu"}]
    path = recipe_file(tmp_path, scenes=None, web=["cc", "sbu"], test="held_out", test_split="train",
                       calibration=None,
                       pretrain={"recipe": "tiny.yaml", "overrides": {"data.sources": sources}},
                       **changed("captioner", data__root="coco"), **changed("filter", data__root="coco"))
    shutil.copytree("coco", "cc")
    shutil.copytree("coco", "sbu")
    with pytest.raises(FileNotFoundError, match=r"source cc: cc holds no shards\.json: CapFilt reads shards"):
        plan(recipe_of(path))
    for name in ("cc", "sbu"):
        shutil.rmtree(name)
        pack("coco", "coco/annotations.jsonl", name)
    with pytest.raises(FileNotFoundError, match="held_out holds neither"):
        plan(recipe_of(path))
    shutil.copytree("coco", "held_out")
    (loop,) = plan(recipe_of(path))
    assert [source.root for source in loop.stages["bootstrapped"].data.sources or []] == [
        "runs/loop/seed-0/cleaned/cc", "coco", "runs/loop/seed-0/cleaned/sbu"]
    assert {name: arguments[0] for name, arguments in loop.capfilt.items()} == {"cc": "cc", "sbu": "sbu"}
    assert "--output=runs/loop/seed-0/cleaned/sbu" in loop.capfilt["sbu"]


def test_ranks_are_started_by_the_loop_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="without torchrun"):
        plan(recipe_of(recipe_file(tmp_path)))


def test_the_scenes_recipe_is_sound(monkeypatch):
    """Three loops, each with its own seed; half of the web pairs are wrong."""
    monkeypatch.delenv("RANK", raising=False)
    planned = plan(recipe_of(RECIPES / "bootstrap_scenes.yaml", "--seeds", "[0, 1, 2]"))
    assert [loop.seed for loop in planned] == [0, 1, 2]
    for loop in planned:
        assert {recipe.seed for recipe in loop.stages.values()} == {loop.seed}
        assert loop.recipe.scenes.noise == 0.5
        assert loop.stages["filter"].data.shuffle_buffer == 1  # twins stay together


def test_the_published_recipe_wants_its_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="pretrain: source web: data/web holds neither"):
        plan(recipe_of(RECIPES / "bootstrap.yaml"))


# ---------------------------------------------------------------- figures


def test_means_deviations_and_wins_over_seeds():
    figures = {0: {"raw_i2t_r1": 0.25, "cleaned_i2t_r1": 0.5, "chance_i2t_r1": 0.1},
               1: {"raw_i2t_r1": 0.75, "cleaned_i2t_r1": 0.75, "chance_i2t_r1": 0.1}}
    found = summary(figures)
    assert found["raw_i2t_r1"] == {"mean": 0.5, "sd": pytest.approx(0.125**0.5)}
    assert summary({0: figures[0]})["raw_i2t_r1"] == {"mean": 0.25, "sd": None}
    assert removal(figures)[1] == []
    columns, rows = comparison(figures)
    assert columns == ["Measure", "raw", "cleaned", "chance", "seeds in which cleaned is better"]
    assert rows == [["retrieval R@1, image → text", "50.0 % ± 35.4", "62.5 % ± 17.7", "10.0 %", "1 of 2"]]
    found = {0: {"removal_recall": 0.91, "chance_removal_recall": 0.5}}
    assert removal(found)[1] == [["wrong texts that were removed", "91.0 %", "90.0 %", "50.0 %"]]
