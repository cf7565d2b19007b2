"""`blip-fast ask`: `Answerer`'s answers about an image or a file of questions, generated or from a list."""

import json

import numpy as np
import pytest
from hf_models import save_model, small_tokenizer
from PIL import Image

from blip_fast.cli import main
from blip_fast.generate import GenerationConfig
from blip_fast.model.blip import BlipModel
from blip_fast.tasks.answerer import Answerer

QUESTIONS = ["is the Man left of the horse?", "two dogs", "a red ball: on a table"]
ANSWERS = ["dog", "a dog", "two dogs", "a red ball", "a red table", "red", "left", "a", "green grass"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vqa")
    save_model("BlipForQuestionAnswering", small_tokenizer(), directory, sep_bias=4.0)
    return str(directory)


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return Answerer.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "answers.txt").write_text("\n".join(ANSWERS) + "\n\n")
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    rows = [{"image": str(tmp_path / f"{i}.png"), "question": question, "question_id": 10 * i + j}
            for i in range(2) for j, question in enumerate(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def ask(checkpoint, capsys, *arguments, status=0):
    assert main(["ask", "--model", checkpoint, "--dtype", "float32", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def test_one_image(checkpoint, answerer, folder, capsys):
    image = folder / "0.png"
    said = ask(checkpoint, capsys, image, *QUESTIONS, "--json", "--beams", "2", "--max-length", "7")
    expected = answerer(image, QUESTIONS, GenerationConfig(beams=2, max_length=7, min_length=1))
    for line, question, answer in zip(said.splitlines(), QUESTIONS, expected, strict=True):
        row = json.loads(line)
        assert (row["image"], row["question"]) == (str(image), question)
        assert (row["answer"], row["token_ids"]) == (answer.answer, answer.token_ids)
        assert row["score"] == pytest.approx(answer.score, abs=1e-5)
    assert ask(checkpoint, capsys, image, QUESTIONS[1]).strip() == answerer(image, QUESTIONS[1])[0].answer


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_a_list_of_answers(checkpoint, answerer, folder, capsys, kind):
    """Questions are cleaned and start with [ENC], as published; the n best answers on request."""
    image = folder / "1.png"
    arguments = [image, *QUESTIONS, "--answers", folder / f"answers.{kind}", "--top-k", "5", "--json"]
    expected = answerer.rank([image] * 3, QUESTIONS, ANSWERS, top_k=5, n_best=3)
    rows = [json.loads(line) for line in ask(checkpoint, capsys, *arguments, "--n-best", "3").splitlines()]
    for row, best in zip(rows, expected, strict=True):
        assert [each["answer"] for each in row["answers"]] == [each.answer for each in best]
        assert [each["score"] for each in row["answers"]] == pytest.approx([each.score for each in best],
                                                                           abs=1e-5)
        assert (row["answer"], row["token_ids"]) == (best[0].answer, best[0].token_ids)
        assert answerer.tokenizer.encode(row["answer"], "[DEC]") == row["token_ids"]
    with_cls = [json.loads(line) for line in ask(checkpoint, capsys, *arguments, "--first-token",
                                                 "[CLS]").splitlines()]
    assert "answers" not in with_cls[0] and with_cls[0]["score"] != pytest.approx(rows[0]["score"], abs=1e-6)


@pytest.mark.parametrize("options", [[], ["--answers", "answers.txt"]])
def test_a_file_of_questions_and_its_resume(checkpoint, folder, capsys, options, monkeypatch):
    """Rows keep their other keys; each image is encoded once; a truncated file is completed."""
    encoded, encode = [], BlipModel.encode_images
    monkeypatch.setattr(BlipModel, "encode_images",
                        lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels))
    options = [folder / option if "." in option else option for option in options]
    whole, cut = folder / "whole.jsonl", folder / "new" / "cut.jsonl"
    arguments = ["--questions", folder / "questions.jsonl", *options]
    ask(checkpoint, capsys, *arguments, "--output", whole)
    assert sum(encoded) == 2
    lines = whole.read_text().splitlines(keepends=True)
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    answered = [json.loads(line) for line in lines]
    assert [{key: row[key] for key in questions[0]} for row in answered] == questions
    cut.parent.mkdir()
    cut.write_text("".join(lines[:4]) + lines[4][:5])
    ask(checkpoint, capsys, *arguments, "--output", cut, "--resume")
    assert sum(encoded) == 3
    for line, expected in zip(cut.read_text().splitlines(), answered, strict=True):
        row = json.loads(line)
        assert row.pop("score") == pytest.approx(expected.pop("score"), abs=1e-5)
        assert row == expected


def test_questions_about_one_image_and_about_many(answerer, folder):
    paths = [folder / "0.png", folder / "1.png"]
    about_one = answerer(paths[0], QUESTIONS)
    mixed = answerer([paths[0], paths[1], paths[0]], QUESTIONS)
    assert [answer.answer for answer in mixed] == [about_one[0].answer,
                                                   answerer(paths[1], QUESTIONS[1])[0].answer,
                                                   about_one[2].answer]
    in_ones = answerer([paths[0], paths[0], paths[1]], QUESTIONS, batch_size=1)
    assert [answer.answer for answer in in_ones[:2]] == [answer.answer for answer in about_one[:2]]


def test_what_is_refused(checkpoint, answerer, folder, capsys):
    (folder / "object.json").write_text("{}")
    (folder / "empty.txt").write_text("\n")
    (folder / "control.txt").write_text("\u200b\n")
    image = folder / "0.png"
    for said, arguments in {
        "name an image and questions": [],
        "no question about": [image],
        "none that is empty": [image, "what?", " "],
        "no JSON list of strings": [image, "what?", "--answers", folder / "object.json"],
        "holds no answer": [image, "what?", "--answers", folder / "empty.txt"],
        "no token": [image, "what?", "--answers", folder / "control.txt"],
        "--top-k must be at least 1": [image, "what?", "--answers", folder / "answers.txt", "--top-k", "0"],
        "--n-best lists answers": [image, "what?", "--n-best", "2"],
        "beams must be at least 1": [image, "what?", "--beams", "0"],
        "first token '[DOG]'": [image, "what?", "--first-token", "[DOG]"],
        "are for --questions": [image, "what?", "--resume"],
        "no such file": [folder / "missing.png", "what?"],
    }.items():
        err = ask(checkpoint, capsys, *arguments, status=2)
        assert said in err and err.count("\n") == 1, (said, err)
    with pytest.raises(ValueError, match="n_best is 0"):
        answerer.rank(image, "what?", ANSWERS, n_best=0)
    with pytest.raises(ValueError,
                       match=r"the longest answer has \d+ tokens with \[DEC\]: this model has 512"):
        answerer.rank(image, "what?", ["dog " * 601])
