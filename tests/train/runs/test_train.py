"""Training runs as a user starts them: the command, its files, resuming, bad recipes."""

import json

import pytest
import torch
from blip_train.recipe import load_recipe
from blip_train.schedule import Schedule, alpha_at
from safetensors.torch import load_file
from training_runs import blip_fast_train, losses


@pytest.fixture(scope="module")
def whole_run(scenes, tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    done = blip_fast_train(scenes, runs)
    assert done.returncode == 0, done.stderr
    return runs


def test_a_filter_without_a_decoder_is_measured_and_reported(scenes, tmp_path):
    """The report once asked every model for captions, so that a filter's run failed after its last step."""
    done = blip_fast_train(scenes, tmp_path, "--model.text_stacks", "encoder", "--objective.losses=[itc,itm]",
                           "--schedule.max_steps", "2", "--evaluation.images", "6")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "tiny" / "metrics.json").read_text())
    assert {"i2t_r1", "t2i_r10"} <= metrics.keys() and "caption_loss" not in metrics


def test_a_run_leaves_its_log_checkpoints_and_model(whole_run):
    run = whole_run / "tiny"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"itc", "itm", "lm", "loss", "lr", "temperature", "pairs_per_second", "data_wait", "skipped",
            "memory_gb"} <= set(rows[0])
    assert rows[0]["lr"] < rows[2]["lr"] == pytest.approx(1e-3)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"
    assert load_recipe(run / "recipe.yaml").objective.queue_size == 20
    assert {"model.safetensors", "config.json", "vocab.txt"} <= {path.name
                                                                 for path in (run / "model").iterdir()}


def test_resuming_gives_the_uninterrupted_run(scenes, whole_run, tmp_path):
    """Killed after four of eight steps and resumed: the same batches, dropout,
    negatives, losses and weights."""
    first = blip_fast_train(scenes, tmp_path, "--schedule.max_steps", "8", "--runtime.save_every", "4")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "tiny"
    # As a run killed before its last save leaves it.
    (run / "checkpoints" / "latest").write_text("step-00000004")
    (run / "model" / "model.safetensors").unlink()
    resumed = blip_fast_train(scenes, tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path) == losses(whole_run)
    ours, theirs = (load_file(root / "tiny" / "model" / "model.safetensors")
                    for root in (tmp_path, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_zero_stages_train_alike(scenes, whole_run, tmp_path, stage):
    done = blip_fast_train(scenes, tmp_path, "--runtime.zero_stage", stage)
    assert done.returncode == 0, done.stderr
    for ours, stage_1 in zip(losses(tmp_path), losses(whole_run), strict=True):
        assert ours == pytest.approx(stage_1, rel=1e-4)


@pytest.fixture(scope="module")
def without_dropout(scenes, tmp_path_factory):
    """In float32, because dropout of 16-bit tensors draws other numbers."""
    runs = tmp_path_factory.mktemp("without_dropout")
    assert blip_fast_train(scenes, runs, "--model.text.dropout", "0").returncode == 0
    return runs


@pytest.mark.parametrize(("stage", "precision", "bound"), [
    ("1", "bfloat16", 2e-2), ("0", "float16", 2e-3), ("2", "float16", 2e-3), ("3", "float16", 2e-3)])
def test_sixteen_bits_train_alike(scenes, without_dropout, tmp_path, stage, precision, bound):
    """ITC and LM of the first steps, to 8 and 11 bits; ITM turns on the negatives, which may be drawn
    otherwise. float16 leaves out its first updates, whose scaled gradients overflow, until the scale fits."""
    done = blip_fast_train(scenes, tmp_path, "--runtime.zero_stage", stage, "--runtime.precision", precision,
                           "--model.text.dropout", "0")
    assert done.returncode == 0, done.stderr
    first = 2 if precision == "float16" else 4
    ours, exact = (torch.tensor(losses(root)[:first])[:, [1, 3]] for root in (tmp_path, without_dropout))
    torch.testing.assert_close(ours, exact, rtol=bound, atol=0)
    assert not torch.equal(ours, exact)
    assert losses(tmp_path)[-1][3] < losses(tmp_path)[0][3]
    assert "torch.autocast is enabled outside DeepSpeed" not in done.stderr + done.stdout


def test_two_ranks_train_together(scenes, tmp_path):
    done = blip_fast_train(scenes, tmp_path, "--runtime.ranks", "2", "--runtime.zero_stage", "2",
                           "--schedule.max_steps", "3")
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3]
    assert len(list((tmp_path / "tiny" / "checkpoints" / "step-00000003").glob("stream-*.pt"))) == 2


def test_a_second_run_does_not_overwrite_the_first(scenes, whole_run):
    again = blip_fast_train(scenes, whole_run)
    assert again.returncode == 2
    assert "holds a run already: go on with --resume" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(("options", "message"), [
    (["--schedule.learning_rate=1"], "unrecognized arguments: --schedule.learning_rate"),
    (["--runtime.zero_stage=7"], "runtime.zero_stage"),
    (["--objective.losses=[itm]"], "itm without itc"),
    (["--model.vision.heads=5"], "vision.heads"),
    (["--data.root=/nowhere"], "holds neither annotations.jsonl nor shards.json"),
])
def test_a_bad_recipe_is_one_clear_line(scenes, tmp_path, options, message):
    done = blip_fast_train(scenes, tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "tiny").exists()


def test_schedules():
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_steps=4, decay=0.5, epochs=10)
    rates = [schedule.lr_at(step, 10) for step in (0, 2, 4, 9, 10, 25, 90)]
    assert rates == pytest.approx([0.2, 0.6, 1, 1, 0.5, 0.25, 0.1])
    cosine = Schedule(kind="cosine", lr=1.0, min_lr=0.0, warmup_steps=0, epochs=2)
    assert [cosine.lr_at(step, 10) for step in (0, 10, 20)] == pytest.approx([1, 0.5, 0])
    assert [alpha_at(step, 10, 0.4, 2.0) for step in (0, 10, 20, 99)] == pytest.approx([0, 0.2, 0.4, 0.4])
