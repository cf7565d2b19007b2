"""Is this encoded image whole, and not too large? Checked from its structure in microseconds, without
decoding.

DALI decodes any size that a header promises, and its decoder reports only that it refused. So packing checks
every file here first: to limit memory, and to know the reason for a refusal.
"""

from __future__ import annotations

import struct
import zlib

from blip_fast.media.images import MAX_PIXELS

_MAGIC = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
_JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0–7, SOI
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0–15; the others are tables
_JPEG_DECODED = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive


class _Broken(Exception):
    """The image is broken; the message is the reason."""


def image_format(content: bytes) -> str | None:
    """`jpg`, `png` or `webp`, judged by the first bytes and not by the file's name; None for anything
    else."""
    for kind, magic in _MAGIC.items():
        if content.startswith(magic) and (kind != "webp" or content[8:12] == b"WEBP"):
            return kind
    return None


def what_is_wrong(content: bytes) -> str | None:
    """The reason not to decode an encoded image, or None if its structure is whole.

    Checks the format, the header's size against MAX_PIXELS, that the end is present, a PNG's checksums, and
    that decoders read this kind of JPEG. Damage inside compressed data goes unnoticed.
    """
    if not content:
        return "empty, 0 bytes"
    kind = image_format(content)
    if kind is None:
        return "neither JPEG, PNG nor WebP"
    try:
        width, height = _SIZES[kind](content)
    except _Broken as broken:
        return f"{kind}: {broken}"
    except (struct.error, IndexError):
        return f"{kind}: ends within its header"
    if width * height == 0:
        return f"{kind}: no pixels ({width} × {height})"
    if width * height > MAX_PIXELS:
        return f"{kind}: {width} × {height} pixels are more than {MAX_PIXELS:,}"
    return None


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of an encoded image that `what_is_wrong` accepts."""
    kind = image_format(content)
    assert kind is not None
    return _SIZES[kind](content)


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Walk the segments up to the first scan. An end marker must follow it (scans escape every 0xFF)."""
    at, size = 2, None
    while True:
        if content[at] != 0xFF:
            raise _Broken("a marker is missing in the header")
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _JPEG_ALONE:
            at += 2
            continue
        if marker in _JPEG_FRAMES:
            bits, height, width = struct.unpack_from(">BHH", content, at + 4)
            if marker not in _JPEG_DECODED or bits != 8:
                raise _Broken(f"a kind that decoders do not read (SOF{marker - 0xC0}, {bits} bits)")
            size = width, height
        if marker == 0xDA:
            break
        if marker == 0xD9:
            raise _Broken("ends before its first scan")
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    if size is None:
        raise _Broken("no frame before its first scan")
    if content.find(b"\xff\xd9", at) < 0:
        raise _Broken("truncated: no end marker")
    return size


def _png_size(content: bytes) -> tuple[int, int]:
    """Walk all chunks to IEND and compare their checksums."""
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            raise _Broken("truncated: a chunk runs past the end")
        if zlib.crc32(memoryview(content)[at + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise _Broken(f"wrong checksum in a {kind.decode('latin-1')!r} chunk")
        at = end + 4
    if content[12:16] != b"IHDR":
        raise _Broken("no header chunk")
    return struct.unpack_from(">II", content, 16)


def _webp_size(content: bytes) -> tuple[int, int]:
    if len(content) < 8 + struct.unpack_from("<I", content, 4)[0]:
        raise _Broken("truncated: shorter than its header says")
    kind = content[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    else:
        raise _Broken("no image chunk")
    return width, height


_SIZES = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}
