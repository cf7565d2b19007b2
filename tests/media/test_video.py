"""Frames of real encoded videos: each shows its own number, so that it is plain which ones were read."""

from contextlib import contextmanager

import numpy as np
import odd_files
import pytest
import torch
from PIL import Image

from blip_fast.media import video
from blip_fast.media.images import ImageError, evaluation_transform
from blip_fast.media.video import frame_places, read_frames, video_pixels

av = pytest.importorskip("av", reason="videos need the extra `video`")
SIDE, CELLS = 64, 4  # a picture of 4 × 4 cells, black or white: the bits of its number


def numbered(number: int) -> Image.Image:
    bits = np.array([number >> bit & 1 for bit in range(CELLS * CELLS)], np.uint8).reshape(CELLS, CELLS)
    return Image.fromarray(255 * bits).resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")


def number_of(image: Image.Image) -> int:
    cells = np.asarray(image.convert("L").resize((CELLS, CELLS), Image.Resampling.BOX)).flatten()
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells))


def encode(path, count, codec="libx264", times=None, muxing=None, **options):
    """A video of numbered frames, a key frame every twelve; `times` gives packets other times."""
    with av.open(str(path), "w", container_options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        frames = [av.VideoFrame.from_image(numbered(i)) for i in range(count)]
        for packet in (packet for frame in [*frames, None] for packet in stream.encode(frame)):
            if times is not None:
                packet.pts = packet.dts = times(packet.pts)
            container.mux(packet)
    return path


def numbers(path, frames):
    return [number_of(image) for image in read_frames(path, frames)]


class TestFramePlaces:
    @pytest.mark.parametrize("wanted", [1, 8, 16])
    def test_as_the_published_code_chooses(self, wanted):
        for frames in range(wanted, 700):
            assert frame_places(frames, wanted) == np.arange(0, frames, frames / wanted, dtype=int).tolist()

    def test_by_hand(self):
        assert frame_places(30, 8) == [0, 3, 6, 9, 12, 15, 18, 21]
        assert frame_places(8, 8) == list(range(8))
        assert frame_places(5, 8) == [0, 0, 1, 1, 2, 3, 3, 4]
        assert frame_places(1, 3) == [0, 0, 0]


@pytest.mark.parametrize(("name", "options"), [
    ("frames out of order.mp4", {}),
    ("open groups.mp4", {"x264-params": "open-gop=1"}),
    ("a.mkv", {}),
    ("vp9.webm", {"codec": "libvpx-vp9", "cpu-used": "8"}),
    ("a.ts", {}),
    ("a.avi", {"codec": "mpeg4"}),
    ("frames out of order.avi", {}),  # FFmpeg's times are wrong here
    ("out of order, mpeg4.avi", {"codec": "mpeg4", "bf": "2"}),
])
def test_the_chosen_frames_are_read(tmp_path, name, options):
    path = encode(tmp_path / name, 70, **options)
    for wanted in (1, 2, 8, 16, 70, 75):
        assert numbers(path, wanted) == frame_places(70, wanted)


def test_frames_of_equal_times_are_counted(tmp_path):
    """Two frames at each time: which is which only their order says."""
    path = encode(tmp_path / "a.mkv", 40, "mjpeg", times=lambda time: time // 2 * 2, strict="-1")
    assert numbers(path, 8) == frame_places(40, 8)


def test_frames_before_the_beginning_do_not_count(tmp_path):
    """Cut without encoding anew: an edit list hides five frames, which the decoder still needs."""
    path = encode(tmp_path / "a.mp4", 65, times=lambda time: time - 5, bf="0")
    for wanted in (1, 8, 60):
        assert numbers(path, wanted) == [place + 5 for place in frame_places(60, wanted)]


def test_what_lies_between_is_not_decoded(tmp_path, monkeypatch):
    decoded = []

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    @contextmanager
    def counted(path, name, opened=video._open_video):
        with opened(path, name) as (container, stream):
            yield Counted(container), stream

    path = encode(tmp_path / "long.mp4", 1000, preset="ultrafast", bf="2")
    monkeypatch.setattr(video, "_open_video", counted)
    assert numbers(path, 8) == frame_places(1000, 8)
    assert 8 <= len(decoded) <= 8 * 2 * 12  # of a frame's group of twelve, and of the group before
    decoded.clear()
    assert numbers(path, 500) == frame_places(1000, 500)
    assert len(decoded) <= 1000  # nothing twice


def test_pixels_are_those_of_the_frames_as_images(tmp_path):
    path = encode(tmp_path / "a.mp4", 30)
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    expected = evaluation_transform([frames[place] for place in (0, 7, 14, 21)], 32)
    pixels = video_pixels(path, 4, 32)
    assert pixels.shape == (4, 3, 32, 32) and torch.equal(pixels, expected)


def truncated(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def written(path, content):
    path.write_bytes(content)
    return path


def spoilt(path):
    """The index stays, the frames after the first third become noise."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 8
    start += (len(content) - start) // 3
    content[start:] = np.random.default_rng(0).bytes(len(content) - start)
    return written(path, bytes(content))


FAST = {"muxing": {"movflags": "faststart"}}  # the index stands in front of the frames
OPENED = "not a whole video of a known format (MP4"


@pytest.mark.parametrize(("make", "said"), [
    (lambda place: place / "lost.mp4", "lost.mp4: no such file"),
    (lambda place: place, OPENED),
    (lambda place: written(place / "empty.mp4", b""), OPENED),
    (lambda place: written(place / "text.mp4", b"no video" * 99), OPENED),
    (lambda place: written(place / "a.jpg", odd_files.encoded(odd_files.picture(), "JPEG")), OPENED),
    (lambda place: written(place / "a.gif", odd_files.encoded(odd_files.picture(), "GIF")), OPENED),
    (lambda place: written(place / "list.mp4", b"ffconcat version 1.0\nfile a.mp4\n"), OPENED),
    (lambda place: sound(place / "sound.mp4"), "sound.mp4: the file has no video stream"),
    (lambda place: truncated(encode(place / "a.avi", 60, "mpeg4"), 0.6), OPENED),
    (lambda place: truncated(encode(place / "a.mp4", 60), 0.6),
     "no video stream, nor any other: is it whole?"),
    (lambda place: truncated(encode(place / "a.mp4", 60, **FAST), 0.8), "truncated video: it ends at "),
    (lambda place: truncated(encode(place / "a.mkv", 60), 0.6), "truncated video: it ends at "),
    (lambda place: spoilt(encode(place / "a.mp4", 60, **FAST)), "broken video: "),
])
def test_what_is_no_whole_video_is_named(tmp_path, make, said):
    encode(tmp_path / "a.mp4", 5)
    path = make(tmp_path)
    with pytest.raises(ImageError) as error:
        read_frames(path, 8)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(video, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr(video, "_wanted_frames", None)
    with pytest.raises(ImageError, match="frames of 64 × 64 pixels are more than 4,095"):
        read_frames(path, 8)


def test_no_frames_and_no_library(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="frames is 0"):
        read_frames(tmp_path / "a.mp4", 0)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"PyAV, which is not installed: pip install 'blip-fast\[video\]'"):
        read_frames(tmp_path / "a.mp4", 8)
