"""Uploads checked by their bytes: every format is recognised with its end; everything else is refused."""

import io

import numpy as np
import pytest
from odd_files import bad_files, bomb, encoded, good_files, picture, png
from PIL import Image

pytest.importorskip("fastapi")

from serving import as_zip

from blip_fast.media.images import load_image
from blip_fast.serve.refusals import Refused
from blip_fast.serve.workers.pictures import FORMATS, format_of, opened

PIXELS = 1_000_000
HTML = b"<html><script>alert(1)</script></html>"
KINDS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}, "GIF": {}, "BMP": {}}


def refusal(body: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        opened(body, PIXELS)
    return caught.value


@pytest.mark.parametrize("name", [name for name in good_files() if not name.endswith(".tiff")])
def test_pictures_are_read_as_offline(name):
    body = good_files()[name]
    assert np.array_equal(np.asarray(opened(body, PIXELS)), np.asarray(load_image(body)))


@pytest.mark.parametrize("options", [
    {"progressive": True}, {"restart_marker_blocks": 1}, {"comment": b"\xff\xd9 no end"},
    {"exif": Image.Exif()}, {"icc_profile": b"\xff\xd9" * 40_000}])
def test_jpegs_end_at_their_own_end(options):
    """Bytes like markers within comments, profiles and scans are not markers."""
    body = encoded(picture(200, 150), "JPEG", **options)
    assert format_of(body) == "JPEG"
    assert format_of(body + b"\0" * 7) == "JPEG"  # padding
    assert refusal(body + HTML).code == "not_an_image"


def test_all_lossy_webps_and_many_frames():
    frames = [picture(61, 41, seed) for seed in range(3)]
    for options in ({"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"},
                    {"save_all": True, "append_images": frames}):
        assert format_of(encoded(frames[0], "WEBP", **options)) == "WEBP"
    assert format_of(encoded(picture().convert("RGBA"), "WEBP")) == "WEBP"
    assert format_of(encoded(frames[0], "PNG", save_all=True, append_images=frames)) == "PNG"
    assert format_of(encoded(frames[0], "GIF", save_all=True, append_images=frames,
                             comment=b"; not the end")) == "GIF"


def test_a_phones_second_picture_belongs_to_the_first():
    """Gain and depth maps may follow the JPEG, as JPEGs; nothing else may."""
    stream = io.BytesIO()
    picture().save(stream, "MPO", save_all=True, append_images=[picture(30, 20, seed=1)])
    several = stream.getvalue()
    assert format_of(several) == "JPEG"
    assert opened(several, PIXELS).size == (60, 40)
    assert "follow the end" in refusal(several + as_zip()).message


@pytest.mark.parametrize("behind", [as_zip(), HTML, b"%PDF-1.7\n", b"\x01", b"\r\n",
                                    encoded(picture(), "PNG")],
                         ids=["zip", "html", "pdf", "a byte", "line end", "png"])
@pytest.mark.parametrize("kind", KINDS)
def test_polyglots_are_refused(kind, behind):
    body = encoded(picture(), kind, **KINDS[kind]) + behind
    assert refusal(body).code == "not_an_image" and "follow the end" in refusal(body).message


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_pictures_are_refused(kind):
    body = encoded(picture(), kind, **KINDS[kind])
    for size in (0, 1, 2, 4, 12, 20, len(body) // 2, len(body) - 1):
        assert refusal(body[:size]).status == 415


@pytest.mark.parametrize("name", [*bad_files(), "plain.tiff"])
def test_what_is_no_picture(name):
    refused = refusal({**bad_files(), **good_files()}[name])
    assert refused.code == ("too_many_pixels" if name == "bomb.png" else "not_an_image")
    assert refused.message.endswith(".") and len(refused.message) < 300


@pytest.mark.parametrize("body", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", HTML, b"%PDF-1.7 ",
                                  as_zip(), b"GIF89a",
                                  b"BM", b"RIFF\xff\xff\xff\xffWEBP", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n",
                                  b"GIF89a/*" + HTML + b"*/=1;",
                                  b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_disguises(body):
    assert refusal(body).code == "not_an_image"


def test_bombs_are_refused_by_their_header(monkeypatch):
    """Without decoding: neither 900 million pixels nor one more than the limit."""
    huge = encoded(picture(), "GIF")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert refusal(bomb()).code == "too_many_pixels"
    over = refusal(png(1001, 1000, 8, 2, b""))
    assert over.code == "too_many_pixels" and "1,001 × 1,000" in over.message and over.status == 422
    assert refusal(huge[:6] + b"\xff\xff\xff\xff" + huge[10:]).code == "too_many_pixels"


def test_mutations_end_in_a_refusal_or_a_picture():
    """A thousand changed files: no other exception, and none takes long."""
    random = np.random.default_rng(0)
    for kind, options in KINDS.items():
        whole = encoded(picture(), kind, **options)
        for _ in range(200):
            body = bytearray(whole)
            for place in random.integers(0, len(body), random.integers(1, 6)):
                body[place] = random.integers(0, 256)
            try:
                opened(bytes(body), PIXELS)
            except Refused as refused:
                assert refused.code in ("not_an_image", "too_many_pixels")


def test_every_format_is_tried():
    assert set(FORMATS) == set(KINDS)
