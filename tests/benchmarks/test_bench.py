"""`blip-fast bench` with small models: its output, its comparisons, and the options that it refuses."""

import json
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from blip_bench import sides, words
from blip_bench.cases import caption, encode, rerank, vqa
from blip_bench.peers import compiled, installed
from blip_bench.timing import Case, Comparison, Disagreement, Rounds, measure
from blip_kernels.cpu import processor

from blip_fast import cli
from blip_fast.checkpoint import save_hugging_face
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import TASK_PARTS, BlipConfig, TextConfig, VisionConfig

CONFIG = BlipConfig(VisionConfig(image_size=32, width=64, layers=2, heads=2, drop_path=0.0),
                    TextConfig(width=64, layers=2, heads=2, mlp_width=128), embed_dim=32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`checkpoints[part]` is a directory with that part (of TASK_PARTS) of a small random model."""
    found = {}
    for part, parts in TASK_PARTS.items():
        torch.manual_seed(0)
        found[part] = tmp_path_factory.mktemp(part)
        save_hugging_face(BlipModel(replace(CONFIG, **parts)), words.tokenizer(), found[part])
    return found


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(encode, "SHAPES", [(64, 64, 64)])
    monkeypatch.setattr(encode, "PEAK_SECONDS", 0.01)


PART = {"caption": "caption", "encode": "match", "rerank": "match", "vqa": "answer"}


@pytest.fixture
def bench(checkpoints, capsys):
    """`bench(task, *options)` → the JSON that the command prints."""
    def run(task, *options):
        model = ["--model", str(checkpoints[PART[task]]), "--image-size", "32", "--rounds", "2"]
        assert cli.main(["bench", task, *model, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


MULTIPLIED = [dtype for dtype in ("float32", "bfloat16") if sides.PRODUCTS[dtype]()]
FLOAT32, BFLOAT16 = "ours float32", "ours bfloat16"


@pytest.mark.parametrize(("task", "cases", "targets"), [
    ("caption", ["3 beams", "greedy"], [
        (FLOAT32, "transformers float32", 2.5), (BFLOAT16, "transformers bfloat16", 2.5),
        (BFLOAT16, "transformers float32", 9.0), (BFLOAT16, "transformers bfloat16", 1.6),
        (BFLOAT16, "transformers float32", 6.0)]),
    ("encode", ["encode"], [(BFLOAT16, "matrix products bfloat16", 0.75)]),
    ("rerank", [f"k = {k}, {dtype}, a {k}th of the work" for dtype in MULTIPLIED[-1:] for k in (16, 64)], [
        (f"ours {dtype}", f"published loop {dtype}", target) for dtype in MULTIPLIED[-1:]
        for target in (5.0, 6.5)]),
    ("vqa", [f"from {start}, {dtype}" for dtype in MULTIPLIED for start in ("encoded questions", "pictures")],
     [(FLOAT32, "published loop float32", 3.0), (BFLOAT16, "published loop bfloat16", 3.0)]),
])
def test_every_task_stands_next_to_the_published_code_with_equal_results(task, cases, targets, bench):
    """In all dtypes that the processor multiplies; rerank and vqa in their default dtypes."""
    has_peers = task in ("caption", "encode")
    peers = ["--peers", "transformers", "--dtypes", ",".join(MULTIPLIED)] if has_peers else []
    found = bench(task, *peers)
    assert found["task"] == task and found["missing"] == {} and found["image_size"] == 32
    assert found["peers"] == {"transformers": metadata.version("transformers")}
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["instructions"] == processor.instruction_set()
    assert [case["case"] for case in found["cases"]] == cases
    ratios = [ratio for case in found["cases"] for ratio in case["ratios"]]
    there = [(ratio["of"], ratio["beside"], ratio["target"]) for ratio in ratios if "target" in ratio]
    assert there == [target for target in targets if target[0].split()[-1] in MULTIPLIED]
    for ratio in ratios:
        assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
        assert "target" not in ratio or ratio["met"] == (ratio["median"] >= ratio["target"])
    assert all(case["agreement"] for case in found["cases"])


@pytest.mark.parametrize("task", ["caption", "encode"])
@pytest.mark.parametrize("peer", ["openvino", "onnxruntime", "compiled"])
def test_peers_stand_next_to_ours_with_equal_results(task, peer, bench, monkeypatch):
    """In float32, captions equal those of transformers token for token, with beams and greedy, or the command
    fails. Compiling a model takes half a minute, so here its modules run uncompiled."""
    monkeypatch.setattr(compiled, "_compile", lambda module: module)
    stands_next_to_ours(task, peer, bench)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["caption", "encode"])
def test_compiled_modules_stand_next_to_ours_with_equal_results(task, bench):
    stands_next_to_ours(task, "compiled", bench)


def stands_next_to_ours(task, peer, bench):
    if reason := installed.missing(peer):
        pytest.skip(reason)
    found = bench(task, "--dtypes", "float32", "--peers", f"{peer},transformers", "--images", "3",
                  "--rounds", "1")
    for case in found["cases"]:
        names = [name for name in case["implementations"] if name.startswith(peer)]
        streams = [f"openvino float32, streams {n}" for n in (1, 2)]
        assert names == (streams if peer == "openvino" else [f"{peer} float32"])
        (ratio,) = (ratio for ratio in case["ratios"] if ratio["beside"] == f"{peer} float32")
        assert ratio["of"] == "ours float32" and ratio["fastest"][1] in names
        assert ("target" in ratio) == (peer == "openvino")
        agreement = [value for what, value in case["agreement"].items() if peer in what]
        assert len(agreement) == len(names)
        assert all(value == 1.0 if task == "caption" else 0 < value < 1e-5 for value in agreement)


@pytest.mark.parametrize(("options", "names", "compared"), [
    ([], ["k = 16, float32, a 16th of the work", "k = 64, float32, a 64th of the work"], [64, 64]),
    pytest.param(["--full"], ["k = 16, float32", "k = 64, float32"], [384 * 16, 384 * 64],
                 marks=pytest.mark.slow),
])
def test_reranking_in_float32_gives_the_published_scores(options, names, compared, bench):
    """Scores are within 1e-4 of the published loop's, or the command fails."""
    cases = bench("rerank", "--dtypes", "float32", *options)["cases"]
    assert [case["case"] for case in cases] == names
    for case, least in zip(cases, compared, strict=True):
        assert case["agreement"]["scores compared"] >= least


def test_the_table_names_who_was_measured(checkpoints, capsys):
    assert cli.main(["bench", "vqa", "--model", str(checkpoints["answer"]), "--image-size", "32",
                     "--images", "2", "--rounds", "1", "--dtypes", "float32"]) == 0
    said = capsys.readouterr().out
    assert processor.instruction_set() in " ".join(said.split()) and "published loop float32" in said
    assert "torch " + torch.__version__ in said and "questions / s" in said


@pytest.mark.parametrize("task", PART)
def test_without_transformers_it_measures_ours_and_says_what_is_missing(task, bench, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    found = bench(task, "--dtypes", "float32")
    assert "pip install" in found["missing"]["transformers"]
    assert set(found["missing"]) == (set(installed.PACKAGES) if task in ("caption", "encode")
                                     else {"transformers"})
    assert all(name.startswith(("ours", "matrix")) for case in found["cases"]
               for name in case["implementations"])


def test_results_that_differ_are_an_error_and_no_figures(bench, monkeypatch, checkpoints, capsys):
    wrong = torch.zeros(64, 320)
    monkeypatch.setattr(rerank, "rerank", lambda matcher, work: (wrong, wrong))
    assert cli.main(["bench", "rerank", "--model", str(checkpoints["match"]), "--image-size",
                     "32", "--dtypes", "float32", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "off the published loop's" in printed.err


@pytest.mark.parametrize(("options", "said"), [
    (["caption", "--rounds", "0"], "--rounds is 0: at least 1"),
    (["rerank", "--images", "3"], "rerank has 64 and 320 captions"),
    (["vqa", "--full"], "--full is for rerank"),
    (["vqa", "--dtypes", "int8"], "--dtypes int8: vqa has float32, bfloat16"),
    (["caption", "--dtypes", "float32,float64"], "--dtypes float64: caption has float32, bfloat16, int8"),
    (["rerank", "--peers", "openvino"], "--peers is for caption and encode"),
    (["encode", "--peers", "openvino,tensorrt"], "--peers tensorrt is unknown: choose from openvino"),
    (["encode", "--model", "no/such/dir"], "no/such/dir"),
])
def test_bad_input_is_one_line(options, said, capsys):
    assert cli.main(["bench", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_named_peer_that_is_missing_is_refused_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "nncf" else object())
    assert cli.main(["bench", "caption", "--peers", "openvino"]) == 2
    assert "nncf not installed: pip install 'blip-fast[peers]'" in capsys.readouterr().err


def test_a_checkpoint_without_the_part_is_refused(checkpoints, capsys):
    assert cli.main(["bench", "vqa", "--model", str(checkpoints["caption"])]) == 2
    assert "cannot take" in capsys.readouterr().err


def test_ratios_are_taken_within_a_round_and_by_flops_where_they_are_known():
    case = Case("a case", {"ours": lambda: 1, "peer": lambda: 2, "counted": lambda: 3},
                flops={"ours": 8, "counted": 4})
    rounds = Rounds(case)
    rounds.seconds = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 8.0, 4.0], "counted": [1.0, 1.0, 4.0]}
    by_seconds, by_flops = (rounds.ratio(Comparison("ours", name)) for name in ("peer", "counted"))
    assert (by_seconds.lowest, by_seconds.median, by_seconds.highest) == (1.0, 2.0, 4.0)
    assert (by_flops.lowest, by_flops.median, by_flops.highest) == (1.0, 2.0, 2.0)


def test_everyone_has_a_turn_in_every_round_after_the_warm_up():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    measure(Case("", calls), 2)
    assert turns == ["a", "b"] * 3
    turns.clear()
    measure(Case("", calls, warm_up=lambda: turns.append("warm")), 1)
    assert turns == ["warm", "a", "b"]


def test_the_fastest_of_a_group_stands_for_it():
    case = Case("", {"ours": lambda: 1, "a": lambda: 2, "b": lambda: 3}, (Comparison("ours", "others"),),
                groups={"others": ["a", "b"]})
    rounds = Rounds(case)
    rounds.seconds = {"ours": [1.0, 1.0, 1.0], "a": [2.0, 9.0, 9.0], "b": [4.0, 3.0, 3.0]}
    (ratio,) = rounds.summary()["ratios"]
    assert ratio["fastest"] == ["ours", "b"] and ratio["median"] == 3.0


def test_like_is_compared_with_like_and_the_best_with_the_best(monkeypatch):
    monkeypatch.setitem(sides.PRODUCTS, "bfloat16", lambda: False)
    names = ["ours float32", "ours bfloat16", "peer float32, streams 1", "peer float32, streams 2",
             "peer bfloat16"]
    targets = {("ours float32", "peer float32"): 1.3, ("ours bfloat16", "peer bfloat16"): 1.4,
               ("ours bfloat16", "ours float32"): 2.0, ("ours int8", "peer int8"): 1.0}
    assert [tuple(vars(each).values()) for each in sides.comparisons(names, targets)] == [
        # no products, no target
        ("ours float32", "peer float32", 1.3), ("ours bfloat16", "peer bfloat16", None),
        ("ours bfloat16", "ours float32", None), ("best of ours", "best of theirs", None)]
    assert sides.groups(names)["peer float32"] == names[2:4]


def test_captions_that_differ_in_float32_disagree():
    same = {f"{who} {dtype}": [[1, 2]] for who in ("ours", "transformers")
            for dtype in ("bfloat16", "float32")}
    assert caption.check(same) == {f"same captions, {who}": 1.0
                                   for who in same if who != "transformers float32"}
    assert caption.check({**same, "ours bfloat16": [[1, 3]]})["same captions, ours bfloat16"] == 0.0
    with pytest.raises(Disagreement, match="captions of ours float32"):
        caption.check({**same, "ours float32": [[1, 3]]})


def test_flops_of_an_image_are_the_counters():
    from reference.model import Sizes, VisionTransformer
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(CONFIG.vision, image_size=64)
    theirs = VisionTransformer(Sizes(image_size=64, vision_width=64, vision_layers=2, vision_heads=2))
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() == encode.flops_of_image(config)


def test_answers_are_as_long_as_vqas_and_begin_alike():
    answers = words.answers(1000, 0)
    assert len(set(answers)) == 1000 and answers == words.answers(1000, 0) != words.answers(1000, 1)
    tokenizer = words.tokenizer()
    tokens = [tokenizer.encode(answer)[1:-1] for answer in answers]
    assert not any(tokenizer.unk_id in ids for ids in tokens)
    assert sum(len(ids) <= 3 for ids in tokens) > 950
    assert len({ids[0] for ids in tokens}) < 600
    assert len(answers) == vqa.ANSWERS
    with pytest.raises(ValueError, match="words for no more"):
        words.answers(10_000, 0)
