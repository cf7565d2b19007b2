"""Clips: short videos of scenes in which one thing moves, with captions, questions and answers.

A clip shows a scene of two things (`scenes.py`). The thing that the caption names first moves across the line
between them, by `PATH` of the picture's side and at constant speed. Its relation to the other thing, and
everything else that captions and questions say about scenes, thus holds in every frame: a model that learnt
from pictures of scenes can be asked about clips.
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

# Directions as (right, down).
DIRECTIONS = {"up": (0.0, -1.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}
ACROSS = {relation: ("up", "down") if relation in ("left of", "right of") else ("left", "right")
          for relation in RELATIONS}
PATH = 0.6  # of the picture's side, half of it before the thing's place and half after
FRAMES = 16
FRAMES_PER_SECOND = 8
QUESTIONS = "questions"  # folder of the rows with questions


@dataclass(frozen=True)
class Clip:
    """A scene of two things; the first one moves in `direction`, one of `DIRECTIONS`."""

    scene: Scene
    direction: str


def sample_clips(count: int, split: str, seed: int) -> list[Clip]:
    """Clips of scenes with two things, drawn by `sample_scenes`, with random directions."""
    scenes = sample_scenes(count, split, seed, one_object_share=0)
    ways = np.random.default_rng([seed, SPLITS.index(split)]).integers(2, size=count)
    return [Clip(scene, ACROSS[str(scene.relation)][way]) for scene, way in zip(scenes, ways, strict=True)]


def draw_clip(clip: Clip, image_size: int, seed: Sequence[int]) -> Iterator[Image.Image]:
    """`FRAMES` RGB images of image_size × image_size pixels. `seed` decides background and jitter, the same
    in all frames."""
    right, down = DIRECTIONS[clip.direction]
    for i in range(FRAMES):
        way = PATH * (i / (FRAMES - 1) - 0.5)
        yield draw(clip.scene, image_size, np.random.default_rng(seed), (right * way, down * way))


def write_video(path: Path, frames: Iterator[Image.Image], image_size: int) -> None:
    """Encode frames of image_size × image_size pixels as MP4 (H.264). image_size must be even."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        # On pictures this small the look-ahead of x264's assembly code is not deterministic; that of its C
        # code is.
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND),
                                      options={"x264-params": "no-asm=1"})
        stream.width, stream.height, stream.pix_fmt = image_size, image_size, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def write_clips(folder: Path, count: int, split: str, seed: int, image_size: int) -> list[dict]:
    """Write clips into `folder` as MP4 with annotations.jsonl. A subfolder `QUESTIONS` has an
    annotations.jsonl with questions about the same files.

    The folder's rows, which are also returned, have image (the video), captions (one) and split. The rows of
    questions, four per clip, have image, question, answers (one), answer_type, question_id and split.

    Raises:
        ValueError: PyAV is not installed; the image size is odd, which H.264's chroma subsampling does not
            allow; or the split is unknown.
    """
    require_av()
    if image_size < 2 or image_size % 2:
        raise ValueError(f"the image size is {image_size}: videos need an even number of pixels a side")
    clips = sample_clips(count, split, seed)
    (folder / QUESTIONS).mkdir(parents=True, exist_ok=True)
    questions = ask([clip.scene for clip in clips], np.random.default_rng([seed, SPLITS.index(split)]))
    caption_rows, question_rows = [], []
    for i, (clip, facts) in enumerate(zip(clips, questions, strict=True)):
        name = f"{i:06d}.mp4"
        write_video(folder / name, draw_clip(clip, image_size, [seed, SPLITS.index(split), i]), image_size)
        caption_rows.append({"image": name, "captions": [caption(clip.scene)], "split": split})
        question_rows += [{"image": f"../{name}", "question": fact.question, "answers": [fact.answer],
                           "answer_type": fact.kind, "question_id": len(question_rows) + j, "split": split}
                          for j, fact in enumerate(facts)]
    for place, rows in ((folder, caption_rows), (folder / QUESTIONS, question_rows)):
        write_annotations(place, rows)
    return caption_rows
