"""Tasks about drawn scenes: every answer follows from the pictures, answers are balanced, train and test
share no combination, and training and `blip-fast evaluate` can read the rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip_fast.cli import main
from blip_fast.data.shards.annotated import read_annotations
from blip_fast.metrics.dialog import dialog_figures
from blip_fast.metrics.vqa import commonest_answer, vqa_accuracy
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.scenes import scene_tasks
from blip_fast.scenes.scene_tasks import CANDIDATES, LONGEST, SIDES, TASKS, WORDS, chance, write_scene_task
from blip_fast.scenes.scenes import COLOURS, SHAPES, SIZES, scene_from_slots
from blip_fast.tasks.dialog_ranking import Dialogue, Round, candidate_texts

COUNT, SIZE = 120, 48


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, list[dict]]]:
    """Folder and rows, as read for evaluation, by task and split."""
    root, found = tmp_path_factory.mktemp("tasks"), {}
    for task in TASKS:
        for split in ("train", "test"):
            folder = root / task / split
            write_scene_task(task, folder, COUNT, split, seed=1, image_size=SIZE)
            found[task, split] = folder, read_annotations(folder / "annotations.jsonl")
    return found


def rows_of(written, task: str) -> list[dict]:
    return written[task, "train"][1] + written[task, "test"][1]


# ---------------------------------------------------------------- answers from slots, without the generator

PLACE = {"left of": "left right", "right of": "right left", "above": "top bottom", "below": "bottom top"}


def things_named(scene: dict, words: list[str]) -> list[int]:
    """The things that words describe: "small thing", "circle", "left thing", "red circle" …"""
    places = PLACE[scene["relation"]].split()
    singular = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}
    descriptors = [singular.get(word, word) for word in words if word not in ("thing", "things", "a", "the")]
    return [i for i, thing in enumerate(scene["things"])
            if all(word in (*thing.values(), places[i]) for word in descriptors)]


def answer_of(scene: dict, question: str, about: int | None = None) -> tuple[str, int | None]:
    """The answer, found by reading the question word by word, and the thing that it is about."""
    words = question.split()
    if words == ["what", "is", "the", "background"]:
        return scene["background"], about
    if words[:2] == ["how", "many"]:
        return str(len(things_named(scene, words[2:]))), None
    if words[0] == "is":
        end = words.index("thing") + 1 if "thing" in words else 3
        (which,) = things_named(scene, words[2:end])
        return "yes" if which in things_named(scene, words[end:]) else "no", which
    if words[-1] == "it":
        assert about is not None
        which = about
    elif words[-3:] == ["the", "other", "thing"]:
        assert about is not None
        which = 1 - about
    else:
        (which,) = things_named(scene, words[2 if words[0] == "where" else 3 :])
    place = PLACE[scene["relation"]].split()[which]
    return place if words[0] == "where" else scene["things"][which][words[1]], which


def true_of(statement: str, scenes: list[dict]) -> bool:
    words = statement.split()
    if words[0] == "both":
        return all(things_named(scene, words[3:]) for scene in scenes)
    side = SIDES.index(words[words.index("picture") - 1])
    scene = scenes[side]
    if words[3:5] == ["is", "on"]:
        return scene["background"] == words[5]
    if words[0] == "in":
        first, second = (f"{thing['colour']} {thing['shape']}" for thing in scene["things"])
        clause = " ".join(words[4:])
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return clause in (f"the {first} is {scene['relation']} the {second}",
                          f"the {second} is {turned[scene['relation']]} the {first}")
    return bool(things_named(scene, words[4:]))


def test_questions_have_the_answer_that_slots_give(written):
    rows = rows_of(written, "questions")
    assert len(rows) == 2 * COUNT * 4
    for row in rows:
        assert (answer_of(row["scene"], row["question"])[0] == row["truth"]
                == commonest_answer(row["answers"])), row
        assert vqa_accuracy(row["truth"], row["answers"]) == 1
        assert row["truth"] in scene_tasks.VALUES[row["answer_type"]]
    assert {row["answer_type"] for row in rows} == set(scene_tasks.VALUES)
    votes = Counter(row["answers"].count(row["truth"]) for row in rows)
    assert set(votes) == {9, 10} and min(votes.values()) > len(rows) / 5
    asked = Counter((row["image"], row["split"], row["question"]) for row in rows)
    assert max(asked.values()) == 1


def test_statements_are_true_of_one_pair_and_false_of_one_that_differs_in_one_slot(written):
    rows = rows_of(written, "pairs")
    for true, false in zip(rows[::2], rows[1::2], strict=True):
        assert true["captions"] == false["captions"] and true["sentence_id"] == false["sentence_id"]
        for row in (true, false):
            assert true_of(row["captions"][0], row["scenes"]) == row["label"], row
        assert (true["label"], false["label"]) == (True, False)
        changed = [(a, b) for a, b in zip(flat(true["scenes"]), flat(false["scenes"]), strict=True) if a != b]
        assert len(changed) == 1, (true, false)
    assert {row["kind"] for row in rows} == set(scene_tasks.STATEMENTS)


def flat(scenes: list[dict]) -> list[str]:
    return [value for scene in scenes
            for value in (*(v for thing in scene["things"] for v in thing.values()), scene["relation"],
                          scene["background"])]


def test_rounds_have_the_answer_that_slots_and_history_give(written):
    for row in rows_of(written, "dialogues"):
        about, asked = None, set()
        assert row["captions"] == [f"two things on {row['scene']['background']}"] and len(row["dialog"]) == 7
        for one in row["dialog"]:
            answer, about = answer_of(row["scene"], one["question"], about)
            assert one["candidates"][one["right"]] == one["answer"] == answer
            assert len(set(one["candidates"])) == len(one["candidates"]) == CANDIDATES
            assert set(scene_tasks.VALUES[one["kind"]]) <= set(one["candidates"])
            asked.add((about, one["kind"]) if one["kind"] != "background" else one["kind"])
        assert len(asked) == 7  # each slot of each thing, and the background


def test_pictures_show_what_rows_say(written):
    """In every picture of every task, each thing's colour is the most common one near the thing's place."""
    spots = {"left": (0.5, 1 / 6), "right": (0.5, 5 / 6), "top": (1 / 6, 0.5), "bottom": (5 / 6, 0.5)}
    for task in TASKS:
        folder, rows = written[task, "test"]
        shown = [pair for row in rows[:60] for pair in (
            [(row["image"], row["scene"])] if "scene" in row else
            zip((row["image"], row["second_image"]), row["scenes"], strict=True))]
        for name, scene in shown:
            pixels = np.asarray(Image.open(folder / name).convert("RGB"), float)
            assert pixels.shape == (SIZE, SIZE, 3)
            for thing, place in zip(scene["things"], PLACE[scene["relation"]].split(), strict=True):
                y, x = (round(at * SIZE) for at in spots[place])
                near = pixels[max(y - 7, 0) : y + 7, max(x - 7, 0) : x + 7].reshape(-1, 3)
                close = {colour: int((np.abs(near - rgb).max(axis=1) < 25).sum())
                         for colour, rgb in COLOURS.items()}
                assert max(close, key=close.__getitem__) == thing["colour"], (name, thing, close)


# ---------------------------------------------------------------- balance, chance, splits, seeds


def test_answers_are_balanced(written):
    """A scene offers a choice of two colours and two shapes, but of all sizes and of both yes and no. Yes and
    no are balanced for every slot."""
    for split in ("train", "test"):
        rows = written["questions", split][1]
        counts = scene_tasks.balance(rows)
        for kind in ("colour", "shape", "size", "yes/no"):
            assert max(counts[kind].values()) - min(counts[kind].values()) <= 5, (kind, counts[kind])
        for slot, values in ((slot, scene_tasks.VALUES[slot]) for slot in scene_tasks.SLOTS):
            yes_no = Counter(row["truth"] for row in rows if row["question"].split()[0] == "is"
                             and row["question"].split()[-1] in values)
            assert abs(yes_no["yes"] - yes_no["no"]) <= 2, (slot, yes_no)
        assert scene_tasks.balance(written["pairs", split][1]) == {
            kind: {"true": COUNT // 8, "false": COUNT // 8} for kind in scene_tasks.STATEMENTS}


def test_chance_is_what_counting_gives(written):
    (_, train), (_, test) = written["questions", "train"], written["questions", "test"]
    found = chance(train, test)
    scores = []
    for row in test:
        same = [other["truth"] for other in train if other["question"] == row["question"]]
        same = same or [other["truth"] for other in train if other["answer_type"] == row["answer_type"]]
        scores.append(vqa_accuracy(Counter(same).most_common(1)[0][0], row["answers"]))
    assert found["vqa_accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert 0.2 < found["vqa_accuracy"] < 0.5
    assert set(found) == {"vqa_accuracy", *(f"vqa_accuracy_{kind}" for kind in scene_tasks.VALUES)}
    assert chance(*(written["pairs", split][1] for split in ("train", "test"))) == {
        "accuracy": 0.5, "consistency": 0.25}


def test_chance_in_dialogues_is_that_of_random_scores(written):
    """Candidates of the question's kind come first, in an order drawn many times; the background is known
    from the caption."""
    import torch

    rounds = [one for row in written["dialogues", "test"][1] for one in row["dialog"]]
    torch.manual_seed(0)
    plausible = torch.tensor([[c in scene_tasks.VALUES[one["kind"]] for c in one["candidates"]]
                              for one in rounds])
    right = torch.tensor([one["right"] for one in rounds])
    is_background = torch.tensor([one["kind"] == "background" for one in rounds])[:, None]
    known = 5 * (is_background & (torch.arange(CANDIDATES) == right[:, None]))
    drawn = [dialog_figures(torch.rand(plausible.shape) + plausible + known, right) for _ in range(30)]
    for name, value in chance([], written["dialogues", "test"][1]).items():
        assert value == pytest.approx(sum(one[name] for one in drawn) / 30, abs=0.01), name


def test_train_and_test_share_no_combination(written):
    for task in TASKS:
        things = {}
        for split in ("train", "test"):
            scenes = [scene for row in written[task, split][1]
                      for scene in row.get("scenes", [row.get("scene")])]
            assert {scene_from_slots(scene).split for scene in scenes} == {split}
            assert {row["split"] for row in written[task, split][1]} == {split}
            things[split] = {frozenset(scene_from_slots(scene).things) for scene in scenes}
        assert len(things["train"]) > 50 and not things["train"] & things["test"]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written_is_a_function_of_the_seed(task, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_scene_task(task, tmp_path / name, 8, "train", seed, 32)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


def test_a_vocabulary_of_these_words_holds_all_texts_in_the_tokens_that_are_told(written):
    used = {word for task in TASKS for row in rows_of(written, task) for text in texts(row)
            for word in text.split()}
    assert used <= set(WORDS) and len(set(WORDS)) == len(WORDS)
    tokenizer = Tokenizer([*BERT_TOKENS, *WORDS])
    lengths = [len(text) for row in rows_of(written, "dialogues") for text in candidate_texts(
        tokenizer, Dialogue("", [Round(one["question"], one["answer"], one["candidates"])
                                 for one in row["dialog"]]), 6, "attention", 10**6)]
    assert LONGEST / 2 < max(lengths) <= LONGEST
    assert {*SIZES, *COLOURS, *SHAPES} <= set(WORDS)


def texts(row: dict) -> list[str]:
    rounds = [text for one in row.get("dialog", []) for text in (one["question"], *one["candidates"])]
    return [*row["captions"], *row.get("answers", []), row.get("question", ""), *rounds]


# ---------------------------------------------------------------- the command


def test_the_command_writes_and_prints(tmp_path, capsys):
    arguments = ["data", "scene-task", "pairs", str(tmp_path / "new"), "--count", "8", "--split", "test",
                 "--image-size", "32"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "directory": str(tmp_path / "new"), "rows": 8, "chance": {"accuracy": 0.5, "consistency": 0.25},
        "balance": {kind: {"false": 1, "true": 1} for kind in sorted(scene_tasks.STATEMENTS)}}
    assert len(list((tmp_path / "new").glob("*.png"))) == 16
    assert main(arguments) == 2
    assert f"{tmp_path / 'new'} exists already" in capsys.readouterr().err
    assert main(["data", "scene-task", "questions", str(tmp_path / "vqa"), "--count", "3", "--image-size",
                 "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0] == f"{tmp_path / 'vqa'}: 12 rows of split train"
            and lines[-1].startswith("chance: vqa_accuracy "))


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError,
                       match="task is 'captions'; tasks about scenes are questions, pairs, dialogues"):
        write_scene_task("captions", tmp_path, 2, "train", 0, 32)
    with pytest.raises(ValueError, match=r"7 pairs asked for: .* take an even number"):
        write_scene_task("pairs", tmp_path, 7, "train", 0, 32)
    with pytest.raises(ValueError, match="scenes have the splits train, test"):
        write_scene_task("questions", tmp_path, 2, "valid", 0, 32)
    assert main(["data", "scene-task", "pairs", str(tmp_path / "x"), "--count", "0"]) == 2
    assert "--count" in capsys.readouterr().err
