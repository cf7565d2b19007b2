"""Scenes: captions are true of the pictures, noise is as planted, held-out combinations stay held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip_fast.scenes import scenes
from blip_fast.scenes.scenes import Scene, Thing, caption, parse_caption, score_caption

RED_LEFT_OF_BLUE = Scene((Thing("small", "red", "cross"), Thing("large", "blue", "circle")), "left of",
                         "grey")


def random_scenes(count: int = 300) -> list[Scene]:
    return scenes.sample_scenes(count, "train", seed=1) + scenes.sample_scenes(count, "test", seed=2)


def test_there_are_enough_scenes_and_the_count_is_true():
    assert scenes.distinct_scenes() >= 100_000
    assert scenes.distinct_scenes("train") + scenes.distinct_scenes("test") == scenes.distinct_scenes()
    combinations = len(scenes.SIZES) * len(scenes.COLOURS) * len(scenes.SHAPES)
    arrangements = len(scenes.RELATIONS) * len(scenes.BACKGROUNDS)
    assert scenes.distinct_scenes() == combinations * (combinations - 1) // 2 * arrangements
    assert 0.18 < scenes.distinct_scenes("test") / scenes.distinct_scenes() < 0.22


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_samples_are_distinct_of_their_split_and_seeded(split: str):
    drawn = scenes.sample_scenes(500, split, seed=3)
    two_objects = [s for s in drawn if len(s.things) == 2]
    assert len(two_objects) == 450
    assert len({min(caption(s), caption(s.turned())) for s in two_objects}) == 450
    assert {s.split for s in drawn} == {split}
    assert all(s.things[0] != s.things[1] for s in two_objects)
    assert drawn == scenes.sample_scenes(500, split, seed=3) != scenes.sample_scenes(500, split, seed=4)


def test_training_never_shows_or_names_a_held_out_combination_but_shows_its_parts():
    rng = np.random.default_rng(0)
    drawn = scenes.sample_scenes(3000, "train", seed=5)
    wrong = [parse_caption(scenes.corrupt(s, rng)) for s in drawn]
    held_out = scenes.sample_scenes(2000, "test", seed=6)
    in_training = {frozenset(s.things) for s in [*drawn, *wrong] if s and len(s.things) == 2}
    in_test = {frozenset(s.things) for s in held_out if len(s.things) == 2}
    assert not in_training & in_test
    assert set().union(*in_training) == set().union(*in_test)


def test_captions_parse_back_and_use_only_the_vocabulary():
    for scene in random_scenes():
        text = caption(scene)
        assert parse_caption(text) == scene
        assert parse_caption(f"a picture of {text}") == scene
        assert set(text.split()) <= set(scenes.VOCABULARY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle",
        "a small red circle on",
        "a small red circle on blue",
        "a small red circle above on grey",
        "a small red circle above a large blue ring",
        "a small red circle above a large blue ring on grey grey",
        "a small red circle a large blue ring on grey",
        "on grey",
    ],
)
def test_what_breaks_the_grammar_does_not_parse_and_scores_nothing(text: str):
    assert parse_caption(text) is None
    assert score_caption(text, RED_LEFT_OF_BLUE) == (0, 8, False)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a small red cross left of a large blue circle on grey", (8, 8, True)),
        ("a large blue circle right of a small red cross on grey", (8, 8, True)),
        ("a large blue circle left of a small red cross on grey", (7, 8, False)),
        ("a large blue circle right of a small green cross on grey", (7, 8, False)),
        ("a small red cross above a large blue ring on white", (5, 8, False)),
        ("a small red cross on grey", (4, 8, False)),
    ],
)
def test_score_counts_slots_in_the_better_telling(text: str, score: tuple):
    assert score_caption(text, RED_LEFT_OF_BLUE) == score


def test_one_object_scores_four_slots():
    scene = Scene((Thing("small", "red", "cross"),), None, "grey")
    assert score_caption("a small red cross on grey", scene) == (4, 4, True)
    assert score_caption("a large red cross on navy", scene) == (2, 4, False)
    assert score_caption(caption(RED_LEFT_OF_BLUE), scene) == (4, 4, False)


def test_corrupted_captions_are_wrong_half_by_one_slot():
    rng = np.random.default_rng(0)
    drawn = [s for s in random_scenes(600) if len(s.things) == 2]
    scores = [score_caption(scenes.corrupt(s, rng), s) for s in drawn]
    assert not any(exact for _, _, exact in scores)
    one_slot = sum(right == total - 1 for right, total, _ in scores) / len(scores)
    assert 0.46 < one_slot < 0.55


def test_twins_differ_in_one_slot_and_stay_in_training():
    drawn = scenes.sample_twins(400, seed=3, one_object_share=0.2)
    assert {s.split for s in drawn} == {"train"}
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        right, total, exact = score_caption(caption(second), first)
        assert (right, exact) == (total - 1, False)
    assert drawn == scenes.sample_twins(400, seed=3, one_object_share=0.2)
    with pytest.raises(ValueError, match="even number"):
        scenes.sample_twins(7, seed=0)


def test_chance_is_far_below_right_and_agrees_with_counting():
    drawn = scenes.sample_scenes(2000, "train", seed=7, one_object_share=0)
    slots, exact = scenes.chance_levels(drawn, seed=0)
    # One description alone agrees in 2 × (1/2 + 1/8 + 1/5) + 1/4 + 1/8 of 8 slots; the better of two in
    # somewhat more.
    one_telling = (2 * (1 / 2 + 1 / 8 + 1 / 5) + 1 / 4 + 1 / 8) / 8
    assert one_telling < slots < one_telling + 0.12
    assert exact < 0.005


@pytest.mark.parametrize("image_size", [32, 48, 61])
def test_pictures_show_what_is_told(image_size: int):
    """Each thing's colour is concentrated in its place: the colours' centres of mass are related as the
    caption says."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:image_size, :image_size]
    for scene in (s for s in random_scenes(60) if len(s.things) == 2):
        if scene.things[0].colour == scene.things[1].colour:
            continue
        pixels = np.asarray(scenes.draw(scene, image_size, rng), float)
        assert pixels.shape == (image_size, image_size, 3)
        centres = []
        for thing in scene.things:
            near = np.linalg.norm(pixels - scenes.COLOURS[thing.colour], axis=2) < 30
            assert near.sum() >= 4
            centres.append((np.median(x[near]), np.median(y[near])))
        (x0, y0), (x1, y1) = centres
        far = image_size / 5
        ahead = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0,
                 "below": y0 - y1}[str(scene.relation)]
        aside = y1 - y0 if scene.relation in ("left of", "right of") else x1 - x0
        assert ahead > far > abs(aside)


def test_large_covers_more_than_small_and_shapes_differ():
    for shape in scenes.SHAPES:
        covered = {size: np.asarray(scenes._shape_mask(shape, r * 48)).sum()
                   for size, r in scenes.SIZES.items()}
        assert covered["large"] > 1.8 * covered["small"]
    masks = [np.asarray(scenes._shape_mask(shape, 8), float) for shape in scenes.SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.abs(a - b).mean() > 20


def test_the_same_scene_is_drawn_differently_each_time_and_alike_from_one_seed():
    draw = [np.asarray(scenes.draw(RED_LEFT_OF_BLUE, 48, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert (draw[0] == draw[1]).all()
    assert (draw[0] != draw[2]).any()


def test_written_folder_keeps_the_truth(tmp_path: Path):
    rows = scenes.write_scenes(tmp_path / "a", 40, "train", seed=0, noise=0.3, image_size=32)
    assert rows == [
        json.loads(line) for line in (tmp_path / "a" / "annotations.jsonl").read_text().splitlines()]
    assert sum(not row["caption_is_right"] for row in rows) == 12
    for row in rows:
        truth = scenes.scene_from_slots(row["scene"])
        assert score_caption(row["captions"][0], truth)[2] == row["caption_is_right"]
        assert Image.open(tmp_path / "a" / row["image"]).size == (32, 32)
    again = scenes.write_scenes(tmp_path / "b", 40, "train", seed=0, noise=0.3, image_size=32)
    assert again == rows
    for row in rows:
        assert (tmp_path / "a" / row["image"]).read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()


@pytest.mark.parametrize("noise", [-0.1, 1.5])
def test_impossible_noise_is_refused(tmp_path: Path, noise: float):
    with pytest.raises(ValueError, match="share of wrong captions"):
        scenes.write_scenes(tmp_path / "none", 4, "train", seed=0, noise=noise, image_size=32)
    assert not (tmp_path / "none").exists()


def test_impossible_samples_are_refused():
    with pytest.raises(ValueError, match="train, test"):
        scenes.sample_scenes(4, "validation", seed=0)
    with pytest.raises(ValueError, match="two objects"):
        scenes.sample_scenes(10**6, "test", seed=0)
