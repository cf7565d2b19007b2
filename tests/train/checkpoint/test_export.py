"""`blip-fast export`: a run's checkpoint of any ZeRO stage and number of ranks, equals the model
that the run itself exports."""

import json

import pytest
import torch
from blip_train.prepare import prepare_step
from blip_train.recipe import load_recipe
from safetensors.torch import load_file
from training_runs import blip_fast_train, drawn_scenes

from blip_fast.checkpoint import load_model
from blip_fast.cli import main
from blip_fast.model.tokenizer import Tokenizer

STEPS = 4


@pytest.fixture(scope="module", params=["0 1", "2 2", "3 2"],
                ids=["ZeRO 0", "ZeRO 2, 2 ranks", "ZeRO 3, 2 ranks"])
def run(request, tmp_path_factory):
    """A run's directory with checkpoints of steps 2 and 4."""
    folder, (stage, ranks) = tmp_path_factory.mktemp("run"), request.param.split()
    drawn_scenes(folder)
    done = blip_fast_train(folder, folder / "runs", "--runtime.zero_stage", stage, "--runtime.ranks", ranks,
                           "--schedule.max_steps", str(STEPS), "--runtime.save_every", "2",
                           "--objective.momentum=0.5")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_weights_are_the_runs_own(run, tmp_path, capsys):
    assert export(run, tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["form"] == "native" and said["training_tensors"] == 0 and said["tokenizer"]
    ours, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "model"))
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_text() == (run / "model" / name).read_text()


def test_an_earlier_step_for_one_task_in_transformers_layout(run, tmp_path):
    assert export(run, tmp_path / "hf", "--to", "hf", "--task", "caption", "--step", 2) == 0
    model, tokenizer = load_model(tmp_path / "hf")
    assert model.config.text_stacks == "decoder" and tokenizer is not None
    later = load_model(run / "model")[0].vision.state_dict()
    assert not torch.equal(model.vision.state_dict()["blocks.0.qkv.weight"], later["blocks.0.qkv.weight"])


def test_a_run_can_start_from_the_published_form_with_training_state(run, tmp_path):
    """Queue and momentum copy come back as the checkpoint has them. (The copy moves
    half-way to the model per step.)"""
    assert export(run, tmp_path / "x.pth", "--to", "original", "--training-state") == 0
    recipe = load_recipe(run / "recipe.yaml", ["--init", str(tmp_path / "x.pth")])
    start = prepare_step(recipe, Tokenizer.from_pretrained(run / "tokenizer"))
    name = "vision.blocks.0.qkv.weight"
    weight, average = start.model.state_dict()[name], start.momentum.copy.state_dict()[name]
    assert torch.equal(weight, load_file(run / "model" / "model.safetensors")[name])
    assert 0 < (weight - average).abs().max() < 0.02
    batches = STEPS * recipe.runtime.ranks
    assert start.queue.pointer == batches * recipe.runtime.batch_size % 20
    torch.testing.assert_close(start.queue.image.norm(dim=1), torch.ones(20))


def test_bad_input_is_one_line(run, tmp_path, capsys):
    cases = {(run, tmp_path / "out", "--step", 3): f"{run} holds no checkpoint of step 3: choose one of 2, 4",
             (tmp_path, tmp_path / "out"): f"{tmp_path} holds no checkpoint",
             (run, run / "model"): "exists already: remove it or choose another name",
             (run, tmp_path / "out", "--to", "hf", "--training-state"): "transformers has no place for "
                                                                        "training state",
             (run, tmp_path / "out", "--to", "hf"): "transformers has no BLIP class"}
    for arguments, message in cases.items():
        assert export(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
