"""Videos for inference: a few frames of each, evenly apart (BLIP section 5.6), read by PyAV (extra `video`).

A video is demuxed once for the times of its frames, which decodes nothing. Then each wanted frame is decoded,
from one of the last two key frames before it on. Everything else is skipped and only wanted frames are kept,
so long videos take little time and no more memory than short ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from blip_fast.media.images import MAX_PIXELS, ImageError, evaluation_transform

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# FFmpeg's readers of MP4 and QuickTime, Matroska and WebM, AVI, and MPEG transport streams. They read only
# the file itself; others (playlists) open whatever the file names.
READERS = {"format_whitelist": "mov,matroska,avi,mpegts", "protocol_whitelist": "file"}
KNOWN = "MP4, QuickTime, Matroska, WebM, AVI, MPEG-TS"
ENDS = 0.9  # packets of a whole video reach this share of the duration in its header


def require_av() -> None:
    """Raises ValueError where PyAV is not installed."""
    if find_spec("av") is None:
        raise ValueError("videos need PyAV, which is not installed: pip install 'blip-fast[video]'")


def frame_places(frames: int, wanted: int) -> list[int]:
    """Which of its `frames` frames stand for a video: `wanted` places, from 0, in ascending order.

    As published, every ⌊frames / wanted⌋-th frame from the first on. For a video with fewer frames, ⌊i ×
    frames / wanted⌋: frames repeat (the published code then takes only the first).
    """
    if frames < wanted:
        return [i * frames // wanted for i in range(wanted)]
    return [i * (frames // wanted) for i in range(wanted)]


def video_pixels(path: str | Path, frames: int, image_size: int, name: str | None = None) -> Tensor:
    """`read_frames` → float32 [frames, 3, image_size, image_size], after the evaluation transform.

    Several of them stacked are what `Matcher.score_pixels`, `Answerer.answer_pixels` and `retrieve` take for
    images.
    """
    return evaluation_transform(read_frames(path, frames, name), image_size)


def read_frames(path: str | Path, frames: int, name: str | None = None) -> list[Image.Image]:
    """Read the frames at `frame_places` of a video as RGB. As in the published code, rotation is not applied.

    Args:
        path: a file. Its first video stream is read.
        frames: how many, 1 at least.
        name: stands for the video in messages (default: the path).

    Raises:
        ImageError: it is no whole video of a known format, has no video stream or no frame, or has more than
            MAX_PIXELS pixels per frame.
        ValueError: fewer than 1 frame; PyAV is not installed.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}: a video is known by 1 at least")
    require_av()
    name = name or str(path)
    with _open_video(path, name) as (container, stream):
        times = _frame_times(container, stream, name)
    if times.count == 0:
        raise ImageError(f"{name}: the video has no frame")
    places = frame_places(times.count, frames)
    with _open_video(path, name) as (container, stream):
        images = {place: frame.to_image()
                  for place, frame in _wanted_frames(container, stream, sorted({*places}), times)}
    if lost := [place for place in places if place not in images]:
        raise ImageError(f"{name}: broken video: frame {lost[0]} of {times.count} cannot be decoded")
    return [images[place] for place in places]


@contextmanager
def _open_video(path: str | Path, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream. What FFmpeg raises meanwhile becomes an ImageError."""
    import av
    from av.error import FFmpegError

    try:
        container = av.open(str(path), container_options=READERS)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (FFmpegError, OSError) as error:
        raise ImageError(f"{name}: not a whole video of a known format ({KNOWN}): {error.strerror}") from None
    with container:
        if not container.streams.video:
            raise ImageError(f"{name}: the file has no video stream"
                             f"{'' if len(container.streams) else ', nor any other: is it whole?'}")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise ImageError(f"{name}: frames of {stream.width} × {stream.height} pixels are more than "
                             f"{MAX_PIXELS:,}: scale it down first")
        try:
            yield container, stream
        except FFmpegError as error:
            raise ImageError(f"{name}: broken video: {error.strerror}") from None


@dataclass(frozen=True)
class _Times:
    """How many frames there are. If their times can be trusted, also the place of the frame at each time, and
    the key frames in order: (place, time to start reading at)."""

    count: int
    places: dict[int | None, int] | None
    keys: list[tuple[int, int]]


def _frame_times(container: InputContainer, stream: VideoStream, name: str) -> _Times:
    """Raises ImageError where the file ends too early."""
    shown: list[int | None] = []
    starts: list[tuple[int, int]] = []
    end = 0.0
    for packet in container.demux():
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None and packet.time_base is not None:
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index or packet.size == 0:
            continue
        if not packet.is_discard:
            shown.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            starts.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    duration = (container.duration or 0) / 1e6
    if end < ENDS * duration:
        raise ImageError(f"{name}: truncated video: it ends at {end:.1f} s of {duration:.1f} s")
    # AVI has no times of presentation: those that FFmpeg makes up are wrong where frames are stored out of
    # order.
    known = [time for time in shown if time is not None]
    if container.format.name == "avi" or len({*known}) < len(shown):
        return _Times(len(shown), None, [])
    places: dict[int | None, int] = {time: place for place, time in enumerate(sorted(known))}
    return _Times(len(shown), places, sorted((places[time], start) for time, start in starts
                                             if time in places))


def _wanted_frames(container: InputContainer, stream: VideoStream, wanted: list[int],
             times: _Times) -> Iterator[tuple[int, VideoFrame]]:
    """(place, frame) of the wanted frames, ascending; without those that cannot be decoded."""
    decoded, place = container.decode(stream), -1
    for target in wanted:
        before = times.keys[: bisect_right(times.keys, target, key=itemgetter(0))][-2:]
        # A seek to the key frame's time of decoding ends there or, in some formats, at the key frame before
        # it.
        if len(before) == 2 and before[0][0] > place:
            container.seek(before[1][1], stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            place = place + 1 if times.places is None else times.places.get(frame.pts, place)
            if place >= target:
                if place == target and not frame.is_corrupt:
                    yield place, frame
                break
