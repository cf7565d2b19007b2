"""Which picture an upload is, by its bytes alone: its format, that nothing else stands behind its end, its size.

A file that is a picture and something else as well (a polyglot: JPEG and ZIP, GIF and HTML) hides the other part behind
the picture's end. So a format is taken only where its end can be found without decoding, and has to be the end of the
upload. TIFF, whose parts may lie anywhere, is not.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

from blip_fast.media.images import ImageError, load_image
from blip_fast.serve.refusals import Refused, not_an_image

NAME = "the picture"

_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # the next marker that is not part of a JPEG's scan
_WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP "}


def opened(body: bytes, most_pixels: int) -> Image.Image:
    """An uploaded picture as RGB, as `load_image` reads it.

    Raises:
        Refused: it is no whole picture of a known format, or something else as well (`not_an_image`); its header says
            that it has more pixels than `most_pixels` (`too_many_pixels`). Nothing was decoded then.
    """
    kind = format_of(body)
    try:
        with Image.open(io.BytesIO(body), formats=(kind,)) as image:
            if image.width * image.height > most_pixels:
                raise _too_many_pixels(f"{image.width:,} × {image.height:,} pixels are", most_pixels)
            return load_image(image, NAME)
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels("The picture's pixels are", most_pixels) from None
    except ImageError as error:
        raise not_an_image(_sentence(error)) from None
    except Exception as error:  # readers raise whatever a broken header leads them to
        raise not_an_image(f"The picture's header is broken ({type(error).__name__})") from None


def format_of(body: bytes) -> str:
    """Pillow's name of the format, of which the upload is one whole file. Raises Refused (`not_an_image`)."""
    for kind, (begins, end) in FORMATS.items():
        if begins(body):
            try:
                size = end(body)
            except (IndexError, struct.error):
                size = None
            if size is None or size > len(body):
                raise not_an_image(f"The {kind} is cut off or broken")
            if size < len(body):
                raise not_an_image(f"{len(body) - size:,} bytes stand behind the end of the {kind}")
            return kind
    raise not_an_image("The upload does not begin as a picture does" if body else "The upload is empty")


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: int) -> bytes:
    """An array uint8 [height, width, 3], or a picture, as a file."""
    stream = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(stream, kind, **options)
    return stream.getvalue()


def _too_many_pixels(subject: str, most: int) -> Refused:
    return Refused(422, "too_many_pixels", f"{subject} more than {most:,}: scale the picture down first.")


def _sentence(error: ImageError) -> str:
    text = str(error).removeprefix(f"{NAME}: ")
    return text[:1].upper() + text[1:200]


def _jpeg(body: bytes) -> int | None:
    """Phones put further JPEGs behind the first (a depth or gain map), perhaps after zeros: those belong to it."""
    end = _one_jpeg(body, 0)
    while end is not None and end < len(body):
        begin = end + len(body[end:]) - len(body[end:].lstrip(b"\0"))
        if not body.startswith(b"\xff\xd8\xff", begin):
            return begin if begin == len(body) else end
        end = _one_jpeg(body, begin)
    return end


def _one_jpeg(body: bytes, place: int) -> int | None:
    """Where the JPEG that begins at `place` ends: segments to skip, and after each start of a scan its data."""
    place += 2
    while body[place] == 0xFF:
        marker = body[place + 1]
        if marker == 0xFF:  # fill
            place += 1
        elif marker == 0xD9:
            return place + 2
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            place += 2
        else:
            (length,) = struct.unpack_from(">H", body, place + 2)
            place += 2 + length
            if marker == 0xDA:
                found = _SCAN_END.search(body, place)
                if found is None:
                    return None
                place = found.start()
    return None


def _png(body: bytes) -> int | None:
    place = 8
    while True:
        length, name = struct.unpack_from(">I4s", body, place)
        place += 12 + length
        if name == b"IEND":
            return place
        if place > len(body):
            return None


def _webp(body: bytes) -> int | None:
    (size,) = struct.unpack_from("<I", body, 4)
    end, place = 8 + size, 12
    while place + 8 <= min(end, len(body)):
        name, length = struct.unpack_from("<4sI", body, place)
        if name not in _WEBP_CHUNKS:
            return None
        place += 8 + length + length % 2
    return end if place == end else None


def _gif(body: bytes) -> int | None:
    place = 13 + _colours(body[10])
    while body[place] != 0x3B:
        if body[place] == 0x21:  # an extension, which begins as blocks of data do
            place += 2
        elif body[place] == 0x2C:  # an image: its place and size, its colours, the width of its codes
            place += 11 + _colours(body[place + 9])
        else:
            return None
        while body[place]:  # blocks of data, each behind its length
            place += 1 + body[place]
        place += 1
    return place + 1


def _colours(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp(body: bytes) -> int | None:
    (size,) = struct.unpack_from("<I", body, 2)
    return size


def _starts(*beginnings: bytes) -> Callable[[bytes], bool]:
    return lambda body: body.startswith(beginnings)


# How each begins, and where it ends: None where it is broken, IndexError or struct.error where it is cut off.
FORMATS: dict[str, tuple[Callable[[bytes], bool], Callable[[bytes], int | None]]] = {
    "JPEG": (_starts(b"\xff\xd8\xff"), _jpeg),
    "PNG": (_starts(b"\x89PNG\r\n\x1a\n"), _png),
    "WEBP": (lambda body: body[:4] == b"RIFF" and body[8:12] == b"WEBP", _webp),
    "GIF": (_starts(b"GIF87a", b"GIF89a"), _gif),
    "BMP": (_starts(b"BM"), _bmp),
}
