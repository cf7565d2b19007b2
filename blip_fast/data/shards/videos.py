"""Annotated videos: rows of `annotations.jsonl` whose `image` names a video. Nothing is read until it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.media.video import require_av, video_pixels


@dataclass(frozen=True, kw_only=True)
class AnnotatedVideo(AnnotatedImage):
    """An image that is `frames` frames of a video: its pixels are [frames, 3, image_size, image_size], and so a model
    sees it as one image with the visual tokens of all of them."""

    frames: int

    def pixels(self, image_size: int, name: str | None = None) -> Tensor:
        """Raises ImageError as `read_frames`."""
        assert isinstance(self.where, Path)
        return video_pixels(self.where, self.frames, image_size, name or self.name)


def as_videos(images: Sequence[AnnotatedImage], frames: int) -> list[AnnotatedImage]:
    """The same rows, with that many frames of each video.

    Raises:
        ValueError: fewer than 1 frame; the rows are those of packed shards, which hold images alone; PyAV is not
            installed.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}: a video is known by 1 at least")
    if packed := next((image.name for image in images if not isinstance(image.where, Path)), None):
        raise ValueError(f"{packed} lies in packed shards, which hold images alone: name a folder of videos")
    require_av()
    return [AnnotatedVideo(image.name, image.where, captions=image.captions, row=image.row, frames=frames)
            for image in images]
