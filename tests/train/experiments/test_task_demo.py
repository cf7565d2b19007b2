"""A small `blip-fast tasks`: data, fine-tunings, clips, their evaluation end to
end, the metrics and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")
from blip_train.experiments import task_demo as demo
from blip_train.experiments.task_demo_report import NAMES
from blip_train.prepare import with_tokenizer
from blip_train.recipe import ScenesRecipe
from patience import PATIENCE

from blip_fast.checkpoint import save_native
from blip_fast.cli import main
from blip_fast.data.shards.annotated import read_annotations
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.scenes.scene_tasks import LONGEST, WORDS, chance

SMALL = """
import json, sys
from pathlib import Path
from blip_train.experiments.task_demo import task_demo
from blip_train.experiments.task_demo_report import write_task_report

result = task_demo(Path(sys.argv[1]), Path(sys.argv[2]), {"questions": (16, 4), "pairs": (16, 8), "dialogues": (16, 3),
                    "clips": (0, 5)},
                   ["--runtime.ranks=1", "--runtime.batch_size=4", "--runtime.precision=float32",
                    "--schedule.max_steps=2"])
write_task_report(result, Path(sys.argv[1]) / "report.html")
print(json.dumps(result.answers))
"""


def save_model(folder: Path, words=WORDS, positions: int = LONGEST) -> Path:
    """A model with fresh weights that reads these words."""
    tokenizer = Tokenizer([*BERT_TOKENS, *words])
    torch.manual_seed(0)
    config = BlipConfig(VisionConfig(image_size=32, width=32, layers=1, heads=1),
                        TextConfig(width=32, layers=1, heads=1, mlp_width=64, max_positions=positions),
                        embed_dim=16)
    save_native(BlipModel(with_tokenizer(config, tokenizer)), tokenizer, folder)
    return folder


def test_all_tasks_end_to_end(tmp_path, capsys):
    model, output = save_model(tmp_path / "model"), tmp_path / "out"
    output.mkdir()
    (output / "report.html").write_text("an earlier one")
    done = subprocess.run([sys.executable, "-c", SMALL, str(output), str(model)], capture_output=True,
                          text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                          timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert {*NAMES, *(f"chance_{name}" for name in NAMES)} <= set(metrics)
    rows = {(task, split): read_annotations(output / "data" / task / split / "annotations.jsonl")
            for task in demo.RECIPES for split in ("train", "test")}
    assert [len(rows[task, "test"]) for task in demo.RECIPES] == [16, 8, 3]
    assert metrics["chance_vqa_accuracy"] == chance(rows["questions", "train"], rows["questions", "test"])[
        "vqa_accuracy"]

    capsys.readouterr()  # the figures are those of the command that users measure with
    for task, run, prefix in (("vqa", "questions", ""), ("nlvr2", "pairs", "nlvr2_"),
                              ("visdial", "dialogues", "visdial_")):
        assert main(["evaluate", task, "--dtype", "float32", "--model", str(output / run / "model"), "--data",
                     str(output / "data" / run / "test"), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        same = {name: value for name, value in said.items() if f"{prefix}{name}" in metrics}
        assert len(same) >= 2
        assert same == pytest.approx({name: metrics[f"{prefix}{name}"] for name in same})

    clips = output / "data" / "clips" / "test"
    for task, tried, data, names in (("video-retrieval", model, clips,
                                      {"i2t_r1": "i2t_r1", "t2i_r1": "t2i_r1"}),
                                     ("video-qa", output / "questions" / "model", clips / "questions",
                                      {"accuracy": "qa_accuracy"})):
        assert main(["evaluate", task, "--dtype", "float32", "--model", str(tried), "--data", str(data),
                     "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said | {theirs: pytest.approx(metrics[f"video_{ours}"])
                       for theirs, ours in names.items()} == said

    page = (output / "report.html").read_text()
    answers = json.loads(done.stdout.splitlines()[-1])
    asked = read_annotations(clips / "questions" / "annotations.jsonl")
    assert {task: len(mine) for task, mine in answers.items()} == {"questions": 16, "clips": 20}
    assert all(row["question"] in page for row in rows["questions", "test"] + asked)
    assert all(one["question"] in page for row in rows["dialogues", "test"] for one in row["dialog"])
    assert all(row["captions"][0] in page for row in rows["pairs", "test"])
    assert page.count("data:image/png") == 4 + 8 + 3 + 5
    assert all(f"{kind} loss" in page for kind in ("Answer", "Reasoning", "Dialogue"))


def test_without_a_model_one_is_pretrained_that_reads_the_tasks(tmp_path, monkeypatch):
    """The recipe is scenes.yaml except for noise, words and positions, and the tasks start from its model."""
    carried = []

    def carry_out(recipe):
        carried.append(recipe)
        if recipe.name != demo.PRETRAINING:
            raise KeyboardInterrupt
        return save_model(recipe.directory / demo.EXPORT)

    monkeypatch.setattr(demo, "carry_out", carry_out)
    with pytest.raises(KeyboardInterrupt):
        demo.task_demo(tmp_path / "out", pictures={"questions": (4, 2)})
    pretraining, first = carried
    assert (pretraining.model.text.max_positions, pretraining.data.scenes) == (LONGEST, ScenesRecipe(
        count=24000, noise=0.0, test=200, one_object_share=0.2, seed=0))
    tokenizer = Tokenizer.from_pretrained(pretraining.tokenizer.source)
    assert all(tokenizer.unk_id not in tokenizer.encode(word) for word in WORDS)
    assert Path(first.init) == tmp_path / "out" / "pretrain" / "model"
    assert (first.name, first.model.vision.image_size) == ("questions", 32)


def test_what_is_refused(tmp_path, monkeypatch):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    good = save_model(tmp_path / "good")
    with pytest.raises(ValueError, match=r"holds good, which is not of these tasks: name another directory"):
        demo.task_demo(tmp_path, good)
    assert kept.read_text() == "mine"
    spelled = save_model(tmp_path / "spelled", words=[word for word in WORDS if word not in ("how", "many")])
    with pytest.raises(ValueError, match="lacks the words how, many: leave --model out"):
        demo.task_demo(tmp_path / "out", spelled)
    short = save_model(tmp_path / "short", positions=40)
    with pytest.raises(ValueError, match=f"has 40 text positions, dialogues need {LONGEST}"):
        demo.task_demo(tmp_path / "out", short)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="blip-fast\\[video\\]"):
        demo.task_demo(tmp_path / "out", good)
    assert not (tmp_path / "out").exists()
