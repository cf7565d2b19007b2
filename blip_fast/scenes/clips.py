"""Clips: short videos of scenes in which one thing moves, with captions, and questions with their answers.

A clip holds a scene of two objects (`scenes.py`). The one that is told first moves across the line between them, by
`PATH` of the picture's side and at one speed, so that its relation to the other, and all else that captions and
questions say of scenes, holds in every frame: a model that learnt from pictures of scenes can be asked about clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from blip_fast.data.shards.annotated import write_annotations
from blip_fast.media.video import require_av
from blip_fast.scenes.scene_tasks import ask
from blip_fast.scenes.scenes import RELATIONS, SPLITS, Scene, caption, draw, sample_scenes

DIRECTIONS = {"up": (0.0, -1.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}  # (right, down)
ACROSS = {relation: ("up", "down") if relation in ("left of", "right of") else ("left", "right")
          for relation in RELATIONS}
PATH = 0.6  # of the picture's side, half of it before the thing's place and half behind
FRAMES = 16
FRAMES_PER_SECOND = 8
QUESTIONS = "questions"  # folder of the rows that ask


@dataclass(frozen=True)
class Clip:
    """A scene of two things, of which the first moves in one of `DIRECTIONS`."""

    scene: Scene
    direction: str


def sample_clips(count: int, split: str, seed: int) -> list[Clip]:
    """Clips of `sample_scenes`' scenes with two things, in random directions."""
    scenes = sample_scenes(count, split, seed, one_object_share=0)
    ways = np.random.default_rng([seed, SPLITS.index(split)]).integers(2, size=count)
    return [Clip(scene, ACROSS[str(scene.relation)][way]) for scene, way in zip(scenes, ways, strict=True)]


def draw_clip(clip: Clip, image_size: int, seed: Sequence[int]) -> Iterator[Image.Image]:
    """`FRAMES` RGB images of image_size × image_size pixels; background and jitter are those of the seed in all."""
    right, down = DIRECTIONS[clip.direction]
    for i in range(FRAMES):
        way = PATH * (i / (FRAMES - 1) - 0.5)
        yield draw(clip.scene, image_size, np.random.default_rng(seed), (right * way, down * way))


def write_video(path: Path, frames: Iterator[Image.Image], image_size: int) -> None:
    """Encode frames of image_size × image_size pixels, an even number, as MP4 (H.264)."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        # On pictures this small x264's assembly does not always look ahead alike; its C does.
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options={"x264-params": "no-asm=1"})
        stream.width, stream.height, stream.pix_fmt = image_size, image_size, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def write_clips(folder: Path, count: int, split: str, seed: int, image_size: int) -> list[dict]:
    """Write clips into `folder` as MP4 with annotations.jsonl, and in it a folder `QUESTIONS`, whose annotations.jsonl
    asks about the same files.

    Rows of the first, also returned: image (the video), captions (one), split. Those of the questions, four about each
    clip: image, question, answers (one), answer_type, question_id, split.

    Raises:
        ValueError: PyAV is not installed; the image size is odd, which H.264's colours do not allow; another split.
    """
    require_av()
    if image_size < 2 or image_size % 2:
        raise ValueError(f"the image size is {image_size}: videos need an even number of pixels a side")
    clips = sample_clips(count, split, seed)
    (folder / QUESTIONS).mkdir(parents=True, exist_ok=True)
    questions = ask([clip.scene for clip in clips], np.random.default_rng([seed, SPLITS.index(split)]))
    told, asked = [], []
    for i, (clip, facts) in enumerate(zip(clips, questions, strict=True)):
        name = f"{i:06d}.mp4"
        write_video(folder / name, draw_clip(clip, image_size, [seed, SPLITS.index(split), i]), image_size)
        told.append({"image": name, "captions": [caption(clip.scene)], "split": split})
        asked += [{"image": f"../{name}", "question": fact.question, "answers": [fact.answer], "answer_type": fact.kind,
                   "question_id": len(asked) + j, "split": split} for j, fact in enumerate(facts)]
    for place, rows in ((folder, told), (folder / QUESTIONS, asked)):
        write_annotations(place, rows)
    return told
