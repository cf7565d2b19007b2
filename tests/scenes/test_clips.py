"""Clips: the written file is a real video in which the right thing moves in the right direction."""

import json

import numpy as np
import pytest

from blip_fast.cli import main
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.media.video import read_frames
from blip_fast.scenes.clips import FRAMES, Clip, draw_clip, sample_clips, write_clips, write_video
from blip_fast.scenes.scene_tasks import facts
from blip_fast.scenes.scenes import Scene, Thing, parse_caption

pytest.importorskip("av", reason="videos need the extra `video`")
RED_AND_BLUE = Thing("small", "red", "circle"), Thing("large", "blue", "square")
# Which coordinate changes, and the sign of the change.
AXIS = {"up": (1, -1), "down": (1, 1), "left": (0, -1), "right": (0, 1)}


def centres(frames, channel):
    """[frames, 2] (x, y) in shares of the side: the mean place of the pixels in which one channel
    dominates."""
    found = []
    for frame in frames:
        pixels = np.asarray(frame).astype(int)
        others = np.delete(pixels, channel, axis=2).max(axis=2)
        y, x = np.nonzero(pixels[:, :, channel] - others > 60)
        found.append((x.mean() / pixels.shape[1], y.mean() / pixels.shape[0]))
    return np.array(found)


@pytest.mark.parametrize(("relation", "direction"), [
    ("left of", "up"), ("right of", "down"), ("above", "left"), ("below", "right")])
def test_the_first_thing_moves_as_told_and_the_other_stays(relation, direction, tmp_path):
    clip = Clip(Scene(RED_AND_BLUE, relation, "grey"), direction)
    write_video(tmp_path / "a.mp4", draw_clip(clip, 64, [3]), 64)
    frames = read_frames(tmp_path / "a.mp4", FRAMES)
    red, blue = centres(frames, 0), centres(frames, 2)
    coordinate, sign = AXIS[direction]
    steps = sign * np.diff(red[:, coordinate])
    assert steps.min() > 0 and steps.sum() == pytest.approx(0.6, abs=0.05)
    assert np.ptp(red[:, 1 - coordinate]) < 0.03 and np.ptp(blue, axis=0).max() < 0.03
    across = red[:, 1 - coordinate] - blue[:, 1 - coordinate]
    assert (across < -0.3).all() if relation in ("left of", "above") else (across > 0.3).all()


def test_clips_are_scenes_of_their_split_and_move_every_way():
    clips = sample_clips(200, "test", seed=4)
    assert clips == sample_clips(200, "test", seed=4) != sample_clips(200, "test", seed=5)
    assert all(clip.scene.split == "test" and len(clip.scene.things) == 2 for clip in clips)
    across = {"left of": "up down", "right of": "up down", "above": "left right", "below": "left right"}
    moves = [(clip.scene.relation, clip.direction) for clip in clips]
    assert {*moves} == {(relation, way) for relation, ways in across.items() for way in ways.split()}


def test_folders_of_clips(tmp_path, capsys):
    folder = tmp_path / "clips"
    assert main(["data", "clips", str(folder), "--count", "3", "--image-size", "32", "--seed", "7",
                 "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"directory": str(folder), "videos": 3,
                                                   "questions": str(folder / "questions")}
    clips, captioned = sample_clips(3, "test", seed=7), annotated_images(folder, "test")
    assert ([parse_caption(caption) for image in captioned for caption in image.captions]
            == [clip.scene for clip in clips])
    asked = annotated_images(folder / "questions", "test")
    true = [{(fact.question, fact.answer, fact.kind) for fact in facts(clip.scene)}
            for clip in clips for _ in range(4)]
    for image, mine in zip(asked, true, strict=True):
        (answer,) = image.row["answers"]
        assert (image.row["question"], answer, image.row["answer_type"]) in mine
    assert len({(image.name, image.row["question"]) for image in asked}) == 12
    assert ([image.where.resolve() for image in asked]
            == [image.where for image in captioned for _ in range(4)])
    assert [image.row["question_id"] for image in asked] == list(range(12))
    again = write_clips(tmp_path / "again", 3, "test", 7, 32)
    assert [row["image"] for row in again] == [image.name for image in captioned]
    for image in captioned:
        assert image.read() == (tmp_path / "again" / image.name).read_bytes()


def test_what_is_refused(tmp_path, capsys):
    for arguments, message in ((["--image-size", "33"], "the image size is 33: videos need an even number"),
                               (["--count", "0"], "--count and --image-size must be at least 1")):
        assert main(["data", "clips", str(tmp_path / "new"), *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
    (tmp_path / "a").write_text("")
    assert main(["data", "clips", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
