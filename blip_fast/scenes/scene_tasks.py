"""Tasks about drawn scenes, with answers known from the scenes' slots: questions (as in VQA), pairs of
pictures with statements (NLVR2) and dialogues (VisDial), written as the rows that fine-tuning and `blip-fast
evaluate` read.

Scenes have two things. Train and test show disjoint combinations of them (`Scene.split`). `chance` is the
score of a reader who sees no picture, to compare a model's figures with.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip_fast.data.shards.annotated import write_annotations
from blip_fast.metrics.vqa import VOTES, vqa_accuracy
from blip_fast.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    VOCABULARY,
    Scene,
    draw,
    sample_scenes,
    slots_of,
)

Row = dict[str, Any]

TASKS = ("questions", "pairs", "dialogues")

PLACES = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"),
          "below": ("bottom", "top")}  # of things[0] and things[1]
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
VALUES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS),
          "place": ("left", "right", "top", "bottom"), "number": ("0", "1", "2"), "yes/no": ("yes", "no")}
SLOTS = ("size", "colour", "shape")  # of a thing

QUESTIONS_EACH = 4  # per picture
DISSENT = 1  # most wrong votes of ten, as of a careless annotator
CANDIDATES = 20  # answers to rank in a round: all possible answers to its question, and others
SIDES = ("left", "right")  # of a pair
STATEMENTS = ("background", "thing", "both", "relation")

WORDS = tuple(sorted({
    *VOCABULARY, *PLURALS.values(), *itertools.chain(*VALUES.values()), "what", "colour", "shape", "size",
    "is", "the", "thing", "things", "background", "how", "many", "where", "both", "pictures", "show", "shows",
    "in", "it", "other", "two"}))
LONGEST = 64  # most tokens of a text about scenes, if each of WORDS is one token


class Fact(NamedTuple):
    """A question with its answer. `kind` is the kind of the answer and `slot` the slot that the question is
    about; both are keys of `VALUES`. They differ for numbers and for yes/no questions."""

    kind: str
    slot: str
    question: str
    answer: str


# ---------------------------------------------------------------- questions


def facts(scene: Scene) -> list[Fact]:
    """All questions that the grammar allows about a scene with two things. "The red thing" occurs only if
    exactly one thing is red."""
    found = [Fact("background", "background", "what is the background", scene.background)]
    for slot in SLOTS:
        of_slot = [getattr(thing, slot) for thing in scene.things]
        for value in VALUES[slot]:
            many = PLURALS[value] if slot == "shape" else f"{value} things"
            found.append(Fact("number", slot, f"how many {many}", str(of_slot.count(value))))
    for i in range(2):
        for known, name in _names(scene, i):
            found += _facts_about(scene, i, known, name)
    return found


def _names(scene: Scene, i: int) -> list[tuple[str, str]]:
    """(slot, name) for each name that fits things[i] alone; the name tells the slot."""
    thing, other = scene.things[i], scene.things[1 - i]
    names = [("place", f"the {_place(scene, i)} thing")]
    for slot in SLOTS:
        value = getattr(thing, slot)
        if value != getattr(other, slot):
            names.append((slot, f"the {value}" if slot == "shape" else f"the {value} thing"))
    return names


def _facts_about(scene: Scene, i: int, known: str, name: str) -> Iterator[Fact]:
    """The questions about things[i] under a `name` that tells its slot `known`."""
    if known != "place":
        yield Fact("place", "place", f"where is {name}", _place(scene, i))
    for slot in SLOTS:
        if slot == known:
            continue
        true = getattr(scene.things[i], slot)
        yield Fact(slot, slot, f"what {slot} is {name}", true)
        for value in VALUES[slot]:
            predicate = f"a {value}" if slot == "shape" else value
            yield Fact("yes/no", slot, f"is {name} {predicate}", "yes" if value == true else "no")


def _place(scene: Scene, i: int) -> str:
    assert scene.relation is not None
    return PLACES[scene.relation][i]


def ask(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[list[Fact]]:
    """`QUESTIONS_EACH` questions about each scene. Kinds take turns; the slot is random among those possible;
    among the answers true of the scene, the one asked for least so far is chosen, so that a question's words
    tell little about its answer."""
    kinds, asked, turn = tuple(VALUES), Counter[tuple[str, str, str]](), 0
    for scene in scenes:
        here, chosen = facts(scene), list[Fact]()
        while len(chosen) < QUESTIONS_EACH:
            kind = kinds[turn % len(kinds)]
            turn += 1
            possible = [here[j] for j in rng.permutation(len(here))
                        if here[j].kind == kind and here[j] not in chosen]
            slots = sorted({fact.slot for fact in possible})
            if slots:  # some scenes have no more questions of this kind
                slot = slots[rng.integers(len(slots))]
                chosen.append(min((fact for fact in possible if fact.slot == slot),
                                  key=lambda fact: asked[kind, slot, fact.answer]))
                asked[kind, slot, chosen[-1].answer] += 1
        yield chosen


def _votes(fact: Fact, rng: np.random.Generator) -> list[str]:
    """Ten answers; at most `DISSENT` of them are wrong, of the same kind."""
    others = [value for value in VALUES[fact.kind] if value != fact.answer]
    wrong = [others[rng.integers(len(others))] for _ in range(rng.integers(DISSENT + 1))]
    votes = [fact.answer] * (VOTES - len(wrong)) + wrong
    return [votes[j] for j in rng.permutation(VOTES)]


def _question_rows(folder: Path, count: int, split: str, seed: int, image_size: int) -> Iterator[Row]:
    rng = _rng(seed, split, "questions")
    scenes = sample_scenes(count, split, seed, one_object_share=0.0)
    for i, (scene, asked) in enumerate(zip(scenes, ask(scenes, rng), strict=True)):
        name = _save_drawing(folder, f"{i:06d}.png", scene, image_size, rng)
        for fact in asked:
            yield {"image": name, "question": fact.question, "answers": _votes(fact, rng),
                   "answer_type": fact.kind, "truth": fact.answer, "scene": slots_of(scene)}


def blind_answers(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """For each test question, the most frequent training answer to the same words, or else to the same
    kind."""
    of_words, of_kind = (_commonest_answers(train, key) for key in ("question", "answer_type"))
    return [of_words.get(row["question"], of_kind[row["answer_type"]]) for row in test]


def _commonest_answers(rows: Sequence[Row], key: str) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row[key], Counter())[row["truth"]] += 1
    return {value: answers.most_common(1)[0][0] for value, answers in counts.items()}


# ---------------------------------------------------------------- pairs with statements


class Statement(NamedTuple):
    """A statement. `holds` says whether it is true of (left, right). It can be made false by a change to one
    of the `slots` of picture `where`, 0 or 1."""

    text: str
    holds: Callable[[Scene, Scene], bool]
    slots: tuple[str, ...]
    where: int


def _statement(kind: str, pair: tuple[Scene, Scene], rng: np.random.Generator) -> Statement:
    """A statement of a kind in `STATEMENTS` about one of the two pictures, true of it, or about both."""
    where = int(rng.integers(2))
    scene, side = pair[where], SIDES[where]
    thing = scene.things[rng.integers(2)]
    match kind:
        case "background":
            return Statement(f"the {side} picture is on {scene.background}",
                             lambda *both: both[where].background == scene.background, ("background",), where)
        case "relation":
            first, second = (f"the {thing.colour} {thing.shape}" for thing in scene.things)
            return Statement(f"in the {side} picture {first} is {scene.relation} {second}",
                             lambda *both: first != second and both[where].relation == scene.relation,
                             ("relation",), where)
        case "thing":
            return Statement(f"the {side} picture shows a {thing.size} {thing.colour} {thing.shape}",
                             lambda *both: thing in both[where].things, SLOTS, where)
        case _:
            slot = ("colour", "shape")[rng.integers(2)]
            value = getattr(thing, slot)
            shown = f"a {value}" if slot == "shape" else f"a {value} thing"
            return Statement(f"both pictures show {shown}", lambda *both: all(
                any(getattr(thing, slot) == value for thing in one.things) for one in both), (slot,), where)


def _edits(scene: Scene, slots: Sequence[str]) -> Iterator[Scene]:
    """Every scene of the same split that differs from this one in exactly one of the slots."""
    for slot in slots:
        if slot in SLOTS:
            changed = [replace(scene, things=tuple(replace(thing, **{slot: value}) if i == j else thing
                                                   for j, thing in enumerate(scene.things)))
                       for i in range(len(scene.things)) for value in VALUES[slot]]
        else:
            values = RELATIONS if slot == "relation" else VALUES[slot]
            changed = [replace(scene, **{slot: value}) for value in values]
        yield from (one for one in changed
                    if one != scene and one.split == scene.split and len(set(one.things)) == len(one.things))


def _twin_pairs(kind: str, scenes: Sequence[Scene],
                rng: np.random.Generator) -> tuple[str, list[tuple[Scene, Scene]]]:
    """A statement and two pairs: one for which it is true, and the same pair with one slot changed, for which
    it is false."""
    while True:
        first, second = (scenes[j] for j in rng.integers(len(scenes), size=2))
        statement = _statement(kind, (first, second), rng)
        false = [pair for edit in _edits((first, second)[statement.where], statement.slots)
                 if not statement.holds(*(pair := (edit, second) if statement.where == 0 else (first, edit)))]
        if statement.holds(first, second) and false:
            return statement.text, [(first, second), false[rng.integers(len(false))]]


def _pair_rows(folder: Path, count: int, split: str, seed: int, image_size: int) -> Iterator[Row]:
    rng = _rng(seed, split, "pairs")
    scenes = sample_scenes(count, split, seed, one_object_share=0.0)
    for i in range(count // 2):
        kind = STATEMENTS[i % len(STATEMENTS)]
        text, pairs = _twin_pairs(kind, scenes, rng)
        for label, pair in zip((True, False), pairs, strict=True):
            names = [_save_drawing(folder, f"{2 * i + 1 - label:06d}-{side}.png", scene, image_size, rng)
                     for side, scene in zip(SIDES, pair, strict=True)]
            yield {"image": names[0], "second_image": names[1], "captions": [text], "label": label,
                   "sentence_id": i, "kind": kind, "scenes": [slots_of(scene) for scene in pair]}


# ---------------------------------------------------------------- dialogues


def dialogue(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Fact]]:
    """A caption, which tells only the background, and seven rounds: each thing's three slots in random order,
    where "it" is the thing of the round before, and at a random place the background, which the caption
    tells."""
    first = int(rng.integers(2))
    rounds = []
    for i, name in ((first, f"the {_place(scene, first)} thing"), (1 - first, "the other thing")):
        for j in rng.permutation(len(SLOTS)):
            slot = SLOTS[j]
            rounds.append(Fact(slot, slot, f"what {slot} is {name}", getattr(scene.things[i], slot)))
            name = "it"
    rounds.insert(int(rng.integers(len(rounds) + 1)),
                  Fact("background", "background", "what is the background", scene.background))
    return f"two things on {scene.background}", rounds


def _candidates(fact: Fact, rng: np.random.Generator) -> list[str]:
    """All answers of the fact's kind and others, `CANDIDATES` in random order."""
    others = [value for kind, values in VALUES.items() if kind != fact.kind for value in values]
    some = [others[j] for j in rng.permutation(len(others))[: CANDIDATES - len(VALUES[fact.kind])]]
    together = [*VALUES[fact.kind], *some]
    return [together[j] for j in rng.permutation(CANDIDATES)]


def _dialogue_rows(folder: Path, count: int, split: str, seed: int, image_size: int) -> Iterator[Row]:
    rng = _rng(seed, split, "dialogues")
    for i, scene in enumerate(sample_scenes(count, split, seed, one_object_share=0.0)):
        name = _save_drawing(folder, f"{i:06d}.png", scene, image_size, rng)
        caption, rounds = dialogue(scene, rng)
        dialog = []
        for fact in rounds:
            candidates = _candidates(fact, rng)
            dialog.append({"question": fact.question, "answer": fact.answer, "kind": fact.kind,
                           "candidates": candidates, "right": candidates.index(fact.answer)})
        yield {"image": name, "captions": [caption], "id": i, "dialog": dialog, "scene": slots_of(scene)}


def _blind_ranks(rows: Sequence[Row]) -> dict[str, float]:
    """Expected MRR and recalls when the background is known from the caption, and for every other question
    its possible answers come first, in random order."""
    kinds = [1 if one["kind"] == "background" else len(VALUES[one["kind"]])
             for row in rows for one in row["dialog"]]
    recalls = {f"r{n}": sum(min(n, kind) / kind for kind in kinds) / len(kinds) for n in (1, 5, 10)}
    return {"mrr": sum(sum(1 / rank for rank in range(1, kind + 1)) / kind for kind in kinds) / len(kinds),
            **recalls}


# ---------------------------------------------------------------- folders


def write_scene_task(task: str, folder: Path, count: int, split: str, seed: int,
                     image_size: int) -> dict[str, Any]:
    """Draw a task's pictures into `folder` as PNG with their annotations.jsonl, ready to be packed or
    evaluated.

    Args:
        task: one of `TASKS`.
        count: the number of pictures, or for `pairs` of pairs.
        split: "train" or "test"; no combination of two things is in both.
        seed: decides everything that is drawn and asked.
        image_size: pixels per side.

    Returns:
        `rows`, the number of rows; `balance`, how often each answer is right, by kind; and `chance`, the
        figures of a reader who knows these frequencies but sees no picture.

    Raises:
        ValueError: the task or split is unknown; `count` is more scenes than the split has, or an odd number
            of pairs.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; tasks about scenes are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; scenes have the splits {', '.join(SPLITS)}")
    if task == "pairs" and count % 2:
        raise ValueError(f"{count} pairs asked for: a statement has a true one and a false one, "
                         "so take an even number")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"split": split} | row for row in ROWS[task](folder, count, split, seed, image_size)]
    write_annotations(folder, rows)
    return {"rows": len(rows), "balance": balance(rows), "chance": chance(rows, rows)}


def chance(train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    """The figures on test rows of a reader who has read all training rows but sees no picture, named as in
    `blip-fast evaluate`.

    A question gets the most frequent training answer to the same words. Every statement is true of one pair
    and false of another, so the expected accuracy is a half and the expected consistency a quarter. In
    dialogues the background is known from the caption; for other questions all answers of the kind come
    first, in random order.
    """
    if "dialog" in test[0]:
        return _blind_ranks(test)
    if "label" in test[0]:
        return {"accuracy": 0.5, "consistency": 0.25}
    scores: dict[str, list[float]] = {}
    for row, answer in zip(test, blind_answers(train, test), strict=True):
        for name in ("vqa_accuracy", f"vqa_accuracy_{row['answer_type']}"):
            scores.setdefault(name, []).append(vqa_accuracy(answer, row["answers"]))
    return {name: sum(values) / len(values) for name, values in sorted(scores.items())}


def balance(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How often each answer is right, by kind of question, statement or round."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for one in row.get("dialog", [row]):
            kind, answer = one.get("kind", one.get("answer_type")), one.get("answer", one.get("truth"))
            counts.setdefault(kind, Counter())[str(one["label"]).lower() if answer is None else answer] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def _rng(seed: int, split: str, task: str) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), TASKS.index(task)])


def _save_drawing(folder: Path, name: str, scene: Scene, image_size: int, rng: np.random.Generator) -> str:
    """Draw the scene into a file and return the file's name."""
    draw(scene, image_size, rng).save(folder / name, compress_level=1)
    return name


ROWS: dict[str, Callable[[Path, int, str, int, int], Iterator[Row]]] = {
    "questions": _question_rows, "pairs": _pair_rows, "dialogues": _dialogue_rows}
