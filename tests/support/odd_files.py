"""Files as in real folders of images: odd but readable ones, and broken ones, made from a seed."""

import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, so that lossy formats stay close to it."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phase = np.random.default_rng(seed).uniform(0, 6.28, 3)
    waves = [127.5 + 100 * np.sin(3 * x + 2 * y + p) for p in phase]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def save_pictures(folder: Path, count: int) -> Path:
    """0.png, 1.png, … of 40 × 30 pixels."""
    for i in range(count):
        picture(40, 30, seed=i).save(folder / f"{i}.png")
    return folder


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A handmade PNG: Pillow writes neither 16-bit colour nor headers that promise more than there is."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def rgb_png_16_bit(image: Image.Image) -> bytes:
    """A PNG with each 8-bit sample v as the 16-bit sample 257 v."""
    samples = (np.asarray(image).astype(np.uint16) * 257).astype(">u2")
    return png(image.width, image.height, 16, 2, b"".join(b"\0" + row.tobytes() for row in samples))


def grey_png_16_bit(image: Image.Image) -> bytes:
    samples = (np.asarray(image.convert("L")).astype(np.uint16) * 257).astype(">u2")
    return png(image.width, image.height, 16, 0, b"".join(b"\0" + row.tobytes() for row in samples))


@functools.cache
def bomb() -> bytes:
    """30,000 × 30,000 black pixels in about 110 kB: 2.7 GB once decoded."""
    return png(30_000, 30_000, 1, 0, bytes((1 + 30_000 // 8) * 30_000))


@functools.cache
def good_files() -> dict[str, bytes]:
    """Files that all show `picture()`."""
    image = picture()
    frames = [picture(seed=seed) for seed in (1, 2)]
    return {
        "plain.jpg": encoded(image, "JPEG", quality=95),
        "progressive.jpg": encoded(image, "JPEG", quality=95, progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "turned by exif.jpg": encoded(
            image, "JPEG", quality=95, exif=bytes.fromhex("4d4d002a000000080001011200030000000100060000")
        ),
        "plain.png": encoded(image, "PNG"),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "16 bit.png": rgb_png_16_bit(image),
        "palette.png": encoded(image.quantize(256), "PNG"),
        "palette with transparency.png": encoded(image.quantize(256), "PNG", transparency=b"\x00\xff\x80"),
        "plain.webp": encoded(image, "WEBP", quality=95),
        "animated.webp": encoded(image, "WEBP", quality=95, save_all=True, append_images=frames),
        "animated.gif": encoded(image, "GIF", save_all=True, append_images=frames),
        "plain.bmp": encoded(image, "BMP"),
        "plain.tiff": encoded(image, "TIFF"),
        "png named jpg.jpg": encoded(image, "PNG"),
    }


@functools.cache
def grey_files() -> dict[str, bytes]:
    """Files that all show `picture()` in grey."""
    grey = picture().convert("L")
    return {
        "grey.jpg": encoded(grey, "JPEG", quality=95),
        "grey.png": encoded(grey, "PNG"),
        "grey 16 bit.png": grey_png_16_bit(picture()),
        "grey with alpha.png": encoded(grey.convert("LA"), "PNG"),
    }


@functools.cache
def bad_files() -> dict[str, bytes]:
    """Files that contain no whole image of a reasonable size."""
    jpeg, png_bytes = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    return {
        "empty.jpg": b"",
        "one byte.jpg": b"\xff",
        "error page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header only.jpg": jpeg[:20],
        "truncated.png": png_bytes[: len(png_bytes) // 2],
        "bad checksum.png": png_bytes[:60] + bytes([png_bytes[60] ^ 255]) + png_bytes[61:],
        "noise.png": np.random.default_rng(0).bytes(500),
        "bomb.png": bomb(),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "zero width.png": png(0, 10, 8, 2, b""),
    }
