"""Which precision runs where: the choice, the line about it, and that resumed and shared work keeps it."""

import dataclasses
import json
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from blip_kernels.cpu import processor
from blip_train import run
from blip_train.checkpoint.checkpoints import Written
from blip_train.experiments.bootstrap import _with_precision as loop_with_precision
from blip_train.experiments.bootstrap_recipe import BootstrapRecipe, StageRecipe, plan
from blip_train.recipe import Recipe, RuntimeRecipe, load_recipe
from hf_models import save_model, small_tokenizer
from jsonargparse import ArgumentParser
from PIL import Image

from blip_fast.capfilt.folder import CleanFolder
from blip_fast.cli import GROUP, main
from blip_fast.inference.precision import PRECISIONS, advice, check, explained, parameter_type, resolve
from blip_fast.search import Index
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.explainer import Explainer
from blip_fast.tasks.model_loading import load_for_task

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
RECIPES = sorted((Path(run.__file__).parent / "recipes").glob("*.yaml"))
HINT = "; --dtype float32 for the published figures"
# A command of each kind that loads a model, as far as its options are parsed.
COMMANDS = {
    "ask": ("p.jpg", "why?"), "caption": ("p.jpg",),
    "capfilt": ("s.tar", "--output", "o", "--captioner", "c", "--filter", "f"),
    "classify": ("--labels", "l", "p.jpg"), "explain": ("p.jpg", "a dog", "--output", "o.png"),
    "score": ("p.jpg", "a"),
    "serve": (), "search index": ("--index", "i"), "evaluate retrieval": ("--data", "d"),
    "evaluate caption": ("--data", "d"), "evaluate vqa": ("--data", "d"), "evaluate nlvr2": ("--data", "d"),
    "evaluate visdial": ("--data", "d"), "evaluate video-retrieval": ("--data", "d"),
    "evaluate video-qa": ("--data", "d"),
}


@pytest.fixture
def machine(monkeypatch):
    """A processor or GPU that multiplies the types named."""
    def has(*types: str) -> None:
        for name in ("bfloat16", "float16", "int8", "amx"):
            monkeypatch.setattr(processor, f"has_{name}", lambda name=name: name in types)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or "bfloat16" in types)

    return has


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioner")
    save_model("BlipForConditionalGeneration", small_tokenizer(), directory)
    return str(directory)


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("matcher")
    save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)
    return str(directory)


@pytest.fixture
def pictures(tmp_path):
    for i in range(2):
        Image.new("RGB", (40, 30), (90 * i, 20, 200)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(2)]


# ---------------------------------------------------------------- the choice, and what is said


@pytest.mark.parametrize(("device", "types", "auto"), [
    (CPU, ("bfloat16", "float16", "int8"), "bfloat16"), (CPU, ("bfloat16",), "bfloat16"),
    (CPU, (), "float32"),
    (CPU, ("int8",), "float32"), (CPU, ("float16",), "float32"), (GPU, ("bfloat16",), "bfloat16"),
    (GPU, (), "float16"), (torch.device("meta"), ("bfloat16",), "float32"),
])
def test_auto(machine, device, types, auto):
    machine(*types)
    assert resolve("auto", device) == auto
    assert resolve("auto", device, differentiable=True) == "float32"
    assert [resolve(name, device) for name in PRECISIONS[1:]] == list(PRECISIONS[1:])
    # Parameters that are not 8-bit weights have the type that the device multiplies.
    assert parameter_type("int8", device) == parameter_type(auto, device) == getattr(torch, auto)
    assert all(advice(name, device) is None for name in ("auto", auto, "float32"))
    assert explained("auto", device, hint=HINT).startswith(f"precision: {auto} (")


@pytest.mark.parametrize(("name", "device", "types", "said"), [
    ("bfloat16", CPU, (), "right, but slower than float32 on this processor, which has no products of it: "
                          "float32 or auto is the better choice"),
    ("bfloat16", GPU, (), "right, but slower than float16 on this GPU, which has no products of it: float16 "
                          "or auto is the better choice"),
    ("float16", CPU, ("bfloat16",), "right, but slower than bfloat16 on this processor, which has no "
                                    "products of it: bfloat16 or auto is the better choice"),
    ("int8", CPU, (), "saves memory, not time, on this processor, which has no products of 8-bit integers; "
                      "all else in float32"),
    ("int8", CPU, ("bfloat16", "int8", "amx"), "saves memory, not time, on this processor, which multiplies "
                                               "bfloat16 as fast; all else in bfloat16"),
])
def test_a_named_precision_without_gain_is_advised_against(machine, name, device, types, said):
    machine(*types)
    assert advice(name, device) == explained(name, device, hint=HINT) == f"precision: {name} ({said})"


def test_one_line_says_what_runs_and_why(machine):
    machine("bfloat16", "int8")
    assert explained("auto", CPU, hint=HINT) == f"precision: bfloat16 (this processor multiplies it{HINT})"
    assert explained("bfloat16", GPU) == "precision: bfloat16 (this GPU multiplies it)"
    assert explained("int8", CPU, hint=HINT) == "precision: int8 (all else in bfloat16)"
    assert explained("float32", CPU, hint=HINT) == "precision: float32"
    assert explained("auto", CPU, differentiable=True) == "precision: float32 (gradients are computed in it)"
    machine()
    assert explained("auto", CPU, hint=HINT) == ("precision: float32 (this processor has no products of "
                                                 "bfloat16)")


@pytest.mark.parametrize(("types", "better"), [((), "float32"), (("bfloat16",), "bfloat16")])
def test_float16_is_refused_on_a_cpu_without_it(machine, types, better):
    """The advice is what is fast there, and not bfloat16 where that is slow."""
    machine(*types)
    with pytest.raises(ValueError, match="float16 has no products on this CPU.*"
                                         f"choose {better}, as auto does"):
        check("float16", CPU)
    check("float16", GPU)
    machine("float16")
    check("float16", CPU)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, int8, got "
                                         "'float8'"):
        resolve("float8", CPU)


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize("command", COMMANDS)
def test_auto_is_the_default_of_every_command(command):
    name, *sub = command.split()
    (entry,) = entry_points(group=GROUP, name=name)
    parser = ArgumentParser(exit_on_error=False)
    entry.load().arguments(parser)
    model = () if name == "capfilt" else ("--model", "m")
    args = parser.parse_args([*sub, *model, *COMMANDS[command]])
    assert (args[sub[0]] if sub else args).dtype == "auto"


def test_no_command_is_forgotten():
    """Whoever loads a model by `--dtype` is in the table above; the others have no `--dtype`, or one of their
    own."""
    own = {"bench", "kernels"}
    for entry in entry_points(group=GROUP):
        parser = ArgumentParser(exit_on_error=False)
        entry.load().arguments(parser)
        has = "--dtype" in parser.format_help()
        assert has == (entry.name in COMMANDS or entry.name in own), entry.name


def test_auto_is_the_default_of_the_library(machine, captioner, matcher, monkeypatch):
    # Weights cannot be packed for a processor that is not here.
    monkeypatch.setattr("blip_fast.tasks.model_loading.pack_linear_layers", lambda model: None)
    machine()
    assert load_for_task(captioner, device="cpu")[0].vision.cls_token.dtype == torch.float32
    assert Captioner.from_pretrained(captioner, device="cpu").model.vision.cls_token.dtype == torch.float32
    machine("bfloat16")
    assert load_for_task(captioner, device="cpu")[0].vision.cls_token.dtype == torch.bfloat16
    assert Explainer.from_pretrained(matcher, device="cpu").model.vision.cls_token.dtype == torch.float32


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_auto_is_in_every_recipe(recipe):
    written = yaml.safe_load(recipe.read_text())
    if "web" in written:
        assert "precision" not in written and "dtype" not in written["capfilt"]
        assert BootstrapRecipe.__dataclass_fields__["precision"].default == "auto"
    else:
        assert load_recipe(recipe).runtime.precision == written["runtime"]["precision"] == "auto"
    assert RuntimeRecipe().precision == "auto"


def test_the_library_says_once_that_a_named_precision_is_slow(machine, captioner, capsys):
    machine()
    for _ in range(2):
        load_for_task(captioner, dtype="bfloat16", device="cpu")
    load_for_task(captioner, device="cpu")
    assert capsys.readouterr().err == f"blip-fast: {advice('bfloat16', CPU)}\n"


# ---------------------------------------------------------------- what is gone on with


def test_a_resumed_file_keeps_its_precision(machine, captioner, pictures, tmp_path, capsys):
    """Work begun where bfloat16 is slow continues in float32 where bfloat16 is fast; naming another precision
    is refused."""
    output = str(tmp_path / "captions.jsonl")
    command = ["caption", "--model", captioner, "--device", "cpu", "--output", output, "--max-length", "8"]
    machine()
    assert main([*command, pictures[0]]) == 0
    assert "precision: float32 (this processor has no products of bfloat16)" in capsys.readouterr().err
    machine("bfloat16")
    assert main([*command, *pictures, "--resume", "--dtype", "bfloat16"]) == 2
    assert capsys.readouterr().err == (f"blip-fast: {output} was begun in float32, not in bfloat16: leave "
                                       "--dtype out, or name another file\n")
    assert main([*command, *pictures, "--resume"]) == 0
    assert capsys.readouterr().err == "blip-fast: precision: float32\n"
    rows = [json.loads(line) for line in Path(output).read_text().splitlines()]
    assert [(row["image"], row["dtype"]) for row in rows] == [(picture, "float32") for picture in pictures]


def test_rows_of_pairs_keep_it_too(machine, matcher, pictures, tmp_path, capsys):
    machine()
    output, pairs = tmp_path / "scores.jsonl", tmp_path / "pairs.tsv"
    command = ["score", "--model", matcher, "--device", "cpu", "--pairs", str(pairs), "--output", str(output)]
    pairs.write_text(f"{pictures[0]}\ta dog\n")
    assert main(command) == 0
    machine("bfloat16")
    pairs.write_text(f"{pictures[0]}\ta dog\n{pictures[1]}\ta dog\n")
    assert main([*command, "--resume"]) == 0
    assert [json.loads(line)["dtype"] for line in output.read_text().splitlines()] == ["float32"] * 2


def test_a_file_from_before_precisions_were_noted_goes_on(machine, captioner, pictures, tmp_path):
    machine()
    output = tmp_path / "captions.jsonl"
    output.write_text(json.dumps({"image": pictures[0], "caption": "a dog"}) + "\n")
    assert main(["caption", "--model", captioner, "--device", "cpu", "--output", str(output), "--resume",
                 *pictures]) == 0
    assert [json.loads(line).get("dtype") for line in output.read_text().splitlines()] == [None, "float32"]


def test_json_is_alone_on_standard_output(machine, captioner, pictures, capsys):
    machine()
    assert main(["caption", "--model", captioner, "--device", "cpu", "--json", pictures[0]]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == pictures[0] and "dtype" not in json.loads(printed.out)
    assert printed.err == "blip-fast: precision: float32 (this processor has no products of bfloat16)\n"


def test_an_index_keeps_its_precision(machine, matcher, pictures, tmp_path, capsys):
    machine()
    where = ["--index", str(tmp_path / "index"), "--device", "cpu"]
    assert main(["search", "index", *where, "--model", matcher, pictures[0]]) == 0
    machine("bfloat16")
    assert main(["search", "index", *where, pictures[1]]) == 0
    assert main(["search", "query", *where, "--image", pictures[1]]) == 0
    index = Index.open(tmp_path / "index", device="cpu")
    assert index.options["dtype"] == "float32" and index.matcher.model.vision.cls_token.dtype == torch.float32
    assert main(["search", "index", *where, "--dtype", "bfloat16", pictures[1]]) == 2
    assert "has dtype float32, not bfloat16" in capsys.readouterr().err


def test_a_capfilt_folder_keeps_its_precision(tmp_path):
    pytest.importorskip("pyarrow")
    folder = CleanFolder(tmp_path / "clean")
    assert folder.precision is None
    folder.begin({"dtype": "bfloat16"})
    assert CleanFolder(tmp_path / "clean").precision == "bfloat16"


@pytest.mark.parametrize(("named", "begun", "types", "runs_in"), [
    ("auto", None, (), "float32"), ("auto", None, ("bfloat16",), "bfloat16"),
    ("auto", "bfloat16", (), "bfloat16"), ("auto", "float32", ("bfloat16",), "float32"),
    ("float32", "bfloat16", ("bfloat16",), "float32"),  # a loss that is not finite may want another
])
def test_a_resumed_run_keeps_its_precision(machine, tmp_path, capsys, named, begun, types, runs_in):
    machine(*types)
    recipe = Recipe(name="tiny", runs=str(tmp_path), runtime=RuntimeRecipe(precision=named))
    checkpoint = recipe.directory / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    written = Written(4, 4, 1, 1, "AdamW", 1, 1, "1", {}, begun)
    noted = {key: value for key, value in dataclasses.asdict(written).items() if value is not None}
    (checkpoint / "run.json").write_text(json.dumps(noted))
    assert run._with_precision(recipe, resume=True, device=CPU).runtime.precision == runs_in
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"blip-fast: precision: {runs_in}")
    assert ("slower than float32" in line) == (runs_in == "bfloat16" and not types)


def test_a_loop_keeps_the_precision_that_it_began_with(machine, tmp_path, monkeypatch):
    machine("bfloat16")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("blip_train.experiments.bootstrap_recipe._check_data", lambda *args: None)
    sources = {"data.root": None, "data.sources": [{"name": "web", "root": "w"}]}
    recipe = BootstrapRecipe(
        pretrain=StageRecipe("pretrain_base.yaml", sources), captioner=StageRecipe("caption_coco.yaml"),
        filter=StageRecipe("retrieval_coco.yaml", {"runtime.precision": "float32"}), web=["web"],
        runs=str(tmp_path))
    begun = loop_with_precision(recipe, resume=False)
    (loop,) = plan(begun)
    assert {name: stage.runtime.precision for name, stage in loop.stages.items()} == {
        "pretrain": "bfloat16", "captioner": "bfloat16", "filter": "float32", "bootstrapped": "bfloat16"}
    assert "--dtype=bfloat16" in loop.capfilt["web"]
    recipe.directory.mkdir()
    (recipe.directory / "bootstrap.yaml").write_text(yaml.safe_dump(dataclasses.asdict(begun)))
    machine()
    assert loop_with_precision(recipe, resume=True) == begun
    assert loop_with_precision(recipe, resume=False).precision == "float32"
