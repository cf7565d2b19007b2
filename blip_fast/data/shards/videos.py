"""Annotated videos: rows of `annotations.jsonl` whose `image` names a video. Videos are read only on
request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blip_fast.data.shards.annotated import AnnotatedImage
from blip_fast.media.video import require_av, video_pixels


@dataclass(frozen=True, kw_only=True)
class AnnotatedVideo(AnnotatedImage):
    """`frames` frames of a video as one image: its pixels are [frames, 3, image_size, image_size], and a
    model sees one image with the visual tokens of all frames."""

    frames: int

    def pixels(self, image_size: int, name: str | None = None) -> Tensor:
        """Raises ImageError as `read_frames` does."""
        assert isinstance(self.where, Path)
        return video_pixels(self.where, self.frames, image_size, name or self.name)


def as_videos(images: Sequence[AnnotatedImage], frames: int) -> list[AnnotatedImage]:
    """The same rows as videos, with `frames` frames of each.

    Raises:
        ValueError: `frames` is less than 1; the rows come from packed shards, which hold only images; or PyAV
            is not installed.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}: a video is known by 1 at least")
    if packed := next((image.name for image in images if not isinstance(image.where, Path)), None):
        raise ValueError(f"{packed} lies in packed shards, which hold images alone: name a folder of videos")
    require_av()
    return [AnnotatedVideo(image.name, image.where, captions=image.captions, row=image.row, frames=frames)
            for image in images]
