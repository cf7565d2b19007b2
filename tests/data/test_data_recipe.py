"""The data of a recipe: one root, several sources, shards under a URL. Impossible data is refused at once."""

import json
import subprocess

import pytest
from blip_train.prepare import check_sources, prepare_shards
from blip_train.recipe import load_recipe
from patience import PATIENCE
from training_runs import RECIPE, losses, train_command

from blip_fast.cli import main
from blip_fast.data.input.sources import Source
from blip_fast.data.shards.shards import iterate
from blip_fast.scenes.scenes import write_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`clean`, a folder of scenes; `web`, shards; `web.yaml`, a recipe that mixes the two and names the
    shards by URL."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "clean", 12, "train", seed=0, noise=0.0, image_size=32)
    write_scenes(folder / "scenes", 20, "train", seed=1, noise=0.0, image_size=32)
    assert main(["data", "pack", str(folder / "scenes"), "--output", str(folder / "web")]) == 0
    sources = (f"[{{name: clean, root: {folder / 'clean'}, weight: 1}}, "
               f"{{name: web, root: 'file://{folder / 'web'}', weight: 3}}]")
    recipe = RECIPE.replace("train_split: null", "train_split: train").replace(
        "threads: 1}", f"threads: 1, sources: {sources}, cache: {folder / 'cache'}}}")
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def load(folder, *options):
    return load_recipe(folder / "recipe.yaml", [f"--runs={folder / 'runs'}", *options])


def test_sources_become_shards(folder, tmp_path):
    recipe = load(folder, f"--runs={tmp_path}", "--tokenizer.source=bert-base-uncased")
    assert recipe.data.sources == [Source("clean", str(folder / "clean"), 1),
                                   Source("web", f"file://{folder}/web", 3)]
    check_sources(recipe)
    clean, web = prepare_shards(recipe)
    assert (clean.name, clean.weight, web) == ("clean", 1, recipe.data.sources[1])
    rows = [json.loads(line) for line in (folder / "clean" / "annotations.jsonl").read_text().splitlines()]
    packed = [sample.record["captions"] for sample in iterate(clean.root)]
    assert (sorted(packed) == sorted(row["captions"] for row in rows)
            and packed != [row["captions"] for row in rows])
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(("options", "words"), [
    (["--data.root=x"], "data.root and data.sources are given together"),
    (["--evaluation.images=3"], "have no test split"),
    (["--data.sources=[{name: a, root: x}, {name: a, root: y}]"], "different names: a stands twice"),
    (["--data.sources=[{name: a, root: x, weight: 0}]"], "weight of source a is 0"),
    (["--data.sources=[{root: x}]"], "name"),
])
def test_data_that_cannot_be_is_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        load(folder, *options)


@pytest.mark.parametrize(("sources", "error", "words"), [
    ("[{name: a, root: /nowhere}]", ValueError, "source a: /nowhere holds neither"),
    ("[{name: a, root: 'memory://nowhere'}]", FileNotFoundError, "memory://nowhere holds no shards.json"),
])
def test_data_that_is_not_there_is_named(folder, sources, error, words):
    with pytest.raises(error, match=words):
        check_sources(load(folder, f"--data.sources={sources}"))


def test_no_vocabulary_is_trained_on_captions_far_away(folder):
    with pytest.raises(ValueError, match="none is trained on captions under file://"):
        check_sources(load(folder))


def test_a_run_mixes_sources(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                                   *"abcdefghij"]))
    command, environment = train_command(folder, tmp_path, "--tokenizer.source", str(tmp_path / "vocab.txt"))
    del command[command.index("--data.root") : command.index("--data.root") + 2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 8 and len(list((folder / "cache").glob("*.tar"))) == 1
