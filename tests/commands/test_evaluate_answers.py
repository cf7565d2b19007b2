"""`blip-fast evaluate vqa` and `nlvr2`: the same figures as question by question and pair by pair."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import odd_files
import pytest
import torch
from hf_models import save_model, small_tokenizer
from patience import PATIENCE

from blip_fast.checkpoint import load_model, reasoning_model, save_native
from blip_fast.cli import main
from blip_fast.data.shards.shards import Sample, write_shards
from blip_fast.generate import GenerationConfig
from blip_fast.metrics.vqa import vqa_accuracy
from blip_fast.model.tokenizer import clean_question
from blip_fast.parallel.ranks import Ranks
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.reasoner import Reasoner

CHOICES = ["dog", "a dog", "two dogs", "red", "left", "green grass"]
ASKED = ["Is the man left?", "Two dogs", "A red ball:", "what"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return odd_files.save_pictures(tmp_path_factory.mktemp("pictures"), 6)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("vqa")
    save_model("BlipForQuestionAnswering", small_tokenizer(), directory, sep_bias=4.0)
    return str(directory)


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("nlvr2")
    save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)
    model, tokenizer = load_model(directory)
    model = reasoning_model(model, seed=1)
    with torch.no_grad():
        model.reasoning_head[0].weight.mul_(30)  # some pairs are judged true, some false
    save_native(model, tokenizer, directory / "native")
    return str(directory / "native")


def data(tmp_path: Path, folder: Path, rows: list[dict]) -> str:
    """A new folder with the same pictures."""
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for picture in folder.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    return str(tmp_path)


def evaluate(capsys, *arguments, status=0):
    options = ["--dtype", "float32", *(["--json"] if status == 0 else [])]
    assert main(["evaluate", *map(str, arguments), *options]) == status
    out, err = capsys.readouterr()
    return json.loads(out) if status == 0 else err


def questions(answers) -> list[dict]:
    """Two questions about each of the first two images in succession, and one about a third."""
    return [{"image": f"{i // 2}.png", "question": ASKED[i % 4], "question_id": 100 + i,
             "answers": answers[i], "answer_type": "number" if i == 1 else "other"} for i in range(5)]


@pytest.mark.parametrize("ranked", [False, True])
def test_vqa(vqa, folder, tmp_path, capsys, ranked):
    answerer = Answerer.from_pretrained(vqa, dtype="float32")
    said = []
    for row in questions([None] * 5):
        image, question = folder / row["image"], clean_question(row["question"])
        said.append(answerer.rank(image, question, CHOICES, top_k=4)[0][0].answer if ranked else
                    answerer(image, question, GenerationConfig(beams=2, max_length=6, min_length=1),
                             first_token="[ENC]")[0].answer)
    votes = [[said[0]] * 2 + ["other"] * 8, [f" The {said[1]}!"] * 10, ["nothing"] * 10,
             [said[3]] * 3 + [str(i) for i in range(7)], [said[4]] * 4 + ["x"] * 6]
    (tmp_path / "choices.txt").write_text("\n".join(CHOICES))
    ranking, writing = ["--answers", tmp_path / "choices.txt", "--top-k", 4], ["--beams", 2,
                                                                               "--max-length", 6]
    options = ranking if ranked else writing
    place, output = data(tmp_path, folder, questions(votes)), tmp_path / "new" / "out.json"
    found = evaluate(capsys, "vqa", "--model", vqa, "--data", place, *options, "--output", output)
    assert json.loads(output.read_text()) == [
        {"question_id": 100 + i, "answer": answer} for i, answer in enumerate(said)]
    each = [vqa_accuracy(answer, of) for answer, of in zip(said, votes, strict=True)]
    assert each == pytest.approx([0.6, 1, 0, 0.9, 1])
    assert found == {"task": "vqa", "images": 5, "precision": "float32",
                     "vqa_accuracy": pytest.approx(sum(each) / 5),
                     "vqa_accuracy_number": 1, "vqa_accuracy_other": pytest.approx(2.5 / 4),
                     "commonest_answer": pytest.approx(2 / 5)}


@pytest.mark.parametrize(("answers", "commonest"), [
    (None, None), (["red"], 0), ({"red": 0.2}, 0), ({"red": 0.2, "{said}": 0.3}, 1), (["{said}"] * 9, 1)])
def test_vqa_where_the_official_accuracy_is_not_defined(vqa, folder, tmp_path, capsys, answers, commonest):
    row = questions([None] * 5)[0]
    answerer = Answerer.from_pretrained(vqa, dtype="float32")
    said = answerer(folder / row["image"], clean_question(row["question"]), first_token="[ENC]")
    filled = json.loads(json.dumps(answers).replace("{said}", said[0].answer))
    found = evaluate(capsys, "vqa", "--model", vqa, "--data",
                     data(tmp_path, folder, [row | {"answers": filled}]))
    assert (found["vqa_accuracy"], found["commonest_answer"]) == (None, commonest)
    assert main(["evaluate", "vqa", "--model", vqa, "--data", str(tmp_path)]) == 0
    assert "–" in capsys.readouterr().out


def pairs() -> list[dict]:
    return [{"image": f"{i % 6}.png", "second_image": f"{(i * 2 + 1) % 6}.png",
             "caption": f"Two dogs {i // 2}.", "label": i % 3 == 0} for i in range(40)]


def test_nlvr2_of_a_folder_and_of_shards(nlvr2, folder, tmp_path, capsys):
    """In several batches. Pairs 2i and 2i + 1 share a sentence, unless rows say otherwise."""
    rows, reasoner = pairs(), Reasoner.from_pretrained(nlvr2, dtype="float32")
    right = [(reasoner([(folder / row["image"], folder / row["second_image"])],
                       [row["caption"]]).item() > 0.5)
             == row["label"] for row in rows]
    assert 0 < sum(right) < len(rows)
    expected = {"task": "nlvr2", "images": 40, "precision": "float32", "accuracy": sum(right) / 40,
                "consistency": sum(a and b for a, b in zip(right[::2], right[1::2], strict=True)) / 20}
    found = evaluate(capsys, "nlvr2", "--model", nlvr2, "--data", data(tmp_path, folder, rows))
    assert found == pytest.approx(expected)
    samples = [Sample(f"{i:05d}", (folder / row["image"]).read_bytes(), {**row, "captions": [row["caption"]],
               "sentence_id": i}, (folder / row["second_image"]).read_bytes()) for i, row in enumerate(rows)]
    for sample in samples:
        del sample.record["caption"]
    write_shards(samples, tmp_path / "shards", samples_per_shard=16)
    found = evaluate(capsys, "nlvr2", "--model", nlvr2, "--data", tmp_path / "shards")
    assert found == pytest.approx(expected | {"consistency": expected["accuracy"]})


def published_nlvr2(predictions: Path, labelled: list[dict]) -> tuple[float, float]:
    """(accuracy, consistency) as in NLVR2's own script: no header, identifiers as keys, any case."""
    said = dict(line.split(",") for line in predictions.read_text().splitlines())
    assert len(said) == len(labelled)
    consistent: dict[tuple[str, ...], bool] = {}
    right = 0
    for example in labelled:
        subset, number, _, sentence = example["identifier"].split("-")
        same = said[example["identifier"]].lower() == example["label"].lower()
        right += same
        consistent[subset, number, sentence] = consistent.get((subset, number, sentence), True) and same
    return right / len(labelled), sum(consistent.values()) / len(consistent)


def test_nlvr2_predictions_as_the_published_evaluation_reads_them(nlvr2, folder, tmp_path, capsys):
    """From published annotations to the file of predictions, which agrees with the figures."""
    labelled = [{"identifier": f"dev-{i // 4}-{i % 2}-{i // 2 % 2}", "sentence": row["caption"],
                 "label": str(row["label"])} for i, row in enumerate(pairs())]
    for entry, row in zip(labelled, pairs(), strict=True):
        stem = "-".join(entry["identifier"].split("-")[:3])
        (tmp_path / "dev").mkdir(exist_ok=True)
        for side, name in enumerate((row["image"], row["second_image"])):
            (tmp_path / "dev" / f"{stem}-img{side}.png").write_bytes((folder / name).read_bytes())
    (tmp_path / "dev.json").write_text("".join(json.dumps(entry) + "\n" for entry in labelled))
    assert main(["data", "annotations", "nlvr2", str(tmp_path / "dev.json"), "--output",
                 str(tmp_path / "annotations.jsonl")]) == 0
    capsys.readouterr()
    output = tmp_path / "new" / "predictions.csv"
    found = evaluate(capsys, "nlvr2", "--model", nlvr2, "--data", tmp_path, "--split", "dev",
                     "--output", output)
    assert (found["accuracy"], found["consistency"]) == pytest.approx(published_nlvr2(output, labelled))
    lines = output.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [entry["identifier"] for entry in labelled]
    assert {line.partition(",")[2] for line in lines} == {"True", "False"}


def test_ranks_share_the_work(vqa, nlvr2, folder, tmp_path):
    """Three processes, three images with five questions, 40 pairs: the output of one process, once."""
    for name in ("vqa", "nlvr2"):
        (tmp_path / name).mkdir()
    votes = [["dog"] * 10] * 5
    named = [{**row, "identifier": f"dev-{i}-0-0"} for i, row in enumerate(pairs())]
    runs = {("vqa", vqa, data(tmp_path / "vqa", folder, questions(votes))): tmp_path / "out.json",
            ("nlvr2", nlvr2, data(tmp_path / "nlvr2", folder, named)): tmp_path / "out.csv"}
    for (task, model, place), output in runs.items():
        command = ["evaluate", task, "--model", model, "--data", place, "--output", str(output), "--json"]
        said = []
        for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                         "--nproc-per-node", "3"]):
            done = subprocess.run([*start, "-m", "blip_fast", *command], capture_output=True, text=True,
                                  timeout=PATIENCE)
            assert done.returncode == 0, done.stderr
            said.append((done.stdout, output.read_text()))
        assert said[0] == said[1] and len(said[0][0].splitlines()) == 1


def test_one_process_is_enough_for_the_others(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blip_fast.parallel.ranks.torchrun_ranks", lambda: nullcontext(Ranks(0, 2)))
    place = data(tmp_path, folder, [{"image": "0.png", "caption": "a"}])
    err = evaluate(capsys, "retrieval", "--model", "x", "--data", place, status=2)
    assert "evaluate retrieval is the work of one process: start it without torchrun" in err


def test_what_is_refused(vqa, nlvr2, folder, tmp_path, capsys):
    for i, (task, model, row, said) in enumerate((
        ("vqa", vqa, {"image": "0.png", "caption": "a"}, '0.png has no "question"'),
        ("vqa", nlvr2, questions([None] * 5)[0], "take a VQA checkpoint"),
        ("vqa", vqa, {"image": "9.png", "question": "what?", "answers": None}, "9.png: no such file"),
        ("nlvr2", nlvr2, {"image": "0.png", "caption": "a"}, "0.png is no pair with a sentence"),
        ("nlvr2", nlvr2, {**pairs()[0], "captions": ["b"]}, "0.png is no pair with a sentence"),
        ("nlvr2", vqa, pairs()[0], "take an NLVR2 checkpoint"),
        ("nlvr2", nlvr2, {**pairs()[0], "second_image": "9.png"}, "9.png: no such file"),
    )):
        (tmp_path / str(i)).mkdir()
        err = evaluate(capsys, task, "--model", model, "--data",
                       data(tmp_path / str(i), folder, [row]), status=2)
        assert said in err and err.count("\n") == 1, (said, err)
    unnamed = {"image": "0.png", "question": "what?", "answers": None}
    place = data(tmp_path, folder, [unnamed])
    err = evaluate(capsys, "vqa", "--model", vqa, "--data", place, "--output", "x", status=2)
    assert "0.png has a row without question_id" in err
    place = data(tmp_path, folder, pairs())
    err = evaluate(capsys, "nlvr2", "--model", nlvr2, "--data", place, "--output", "x", status=2)
    assert "0.png has a row without identifier" in err
