"""Uploads checked by their bytes alone: the format, that nothing follows the picture's end, and the size.

A polyglot file (JPEG and ZIP, GIF and HTML) hides its other part after the picture's end. So only formats
whose end can be found without decoding are accepted, and that end must be the end of the upload. TIFF is not
accepted, since its parts may lie anywhere.
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
        Refused: it is not a whole picture of a known format, or something follows it (`not_an_image`); its
            header announces more pixels than `most_pixels` (`too_many_pixels`), in which case nothing has
            been decoded.
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
    except Exception as error:  # a broken header can make a reader raise anything
        raise not_an_image(f"The picture's header is broken ({type(error).__name__})") from None


def format_of(body: bytes) -> str:
    """Pillow's name of the format of a single whole file. Raises Refused (`not_an_image`) for others."""
    for kind, (begins, end) in FORMATS.items():
        if begins(body):
            try:
                size = end(body)
            except (IndexError, struct.error):
                size = None
            if size is None or size > len(body):
                raise not_an_image(f"The {kind} is cut off or broken")
            if size < len(body):
                raise not_an_image(f"{len(body) - size:,} bytes follow the end of the {kind}")
            return kind
    raise not_an_image("The upload does not begin as a picture does" if body else "The upload is empty")


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: int) -> bytes:
    """A picture, or an array uint8 [height, width, 3], encoded as a file."""
    stream = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(stream, kind, **options)
    return stream.getvalue()


def _too_many_pixels(subject: str, most: int) -> Refused:
    return Refused(422, "too_many_pixels", f"{subject} more than {most:,}: scale the picture down first.")


def _sentence(error: ImageError) -> str:
    text = str(error).removeprefix(f"{NAME}: ")
    return text[:1].upper() + text[1:200]


def _jpeg(body: bytes) -> int | None:
    """The end of the last JPEG: phones append a depth or gain map as another JPEG, perhaps after zeros."""
    end = _one_jpeg(body, 0)
    while end is not None and end < len(body):
        begin = end + len(body[end:]) - len(body[end:].lstrip(b"\0"))
        if not body.startswith(b"\xff\xd8\xff", begin):
            return begin if begin == len(body) else end
        end = _one_jpeg(body, begin)
    return end


def _one_jpeg(body: bytes, place: int) -> int | None:
    """The end of the JPEG that begins at `place`: skip its segments and the data of its scans."""
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
        if body[place] == 0x21:  # an extension: a label, then data blocks
            place += 2
        elif body[place] == 0x2C:  # an image: position and size, colour table, code width, then data blocks
            place += 11 + _colours(body[place + 9])
        else:
            return None
        while body[place]:  # data blocks, each preceded by its length
            place += 1 + body[place]
        place += 1
    return place + 1


def _colours(flags: int) -> int:
    """The size of a GIF's colour table in bytes."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp(body: bytes) -> int | None:
    (size,) = struct.unpack_from("<I", body, 2)
    return size


def _starts(*beginnings: bytes) -> Callable[[bytes], bool]:
    return lambda body: body.startswith(beginnings)


# For each format: whether a file begins so, and where it ends. The end is None if the file is broken; a
# truncated file may raise IndexError or struct.error instead.
FORMATS: dict[str, tuple[Callable[[bytes], bool], Callable[[bytes], int | None]]] = {
    "JPEG": (_starts(b"\xff\xd8\xff"), _jpeg),
    "PNG": (_starts(b"\x89PNG\r\n\x1a\n"), _png),
    "WEBP": (lambda body: body[:4] == b"RIFF" and body[8:12] == b"WEBP", _webp),
    "GIF": (_starts(b"GIF87a", b"GIF89a"), _gif),
    "BMP": (_starts(b"BM"), _bmp),
}
