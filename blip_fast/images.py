"""Images for inference: read anything safely as RGB, and BLIP's evaluation transform, exactly as published.

Everything here is Pillow on the CPU: the results equal those of transformers' BlipImageProcessor bit for bit, up to
float32 rounding of the normalisation. Training reads its images through DALI instead (`data/pipeline.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 80_000_000  # 240 MB as RGB; what a header promises is checked before anything is decoded

# Formats whose readers are plain decoders; Pillow's EPS reader, for one, runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"))

ImageSource = str | Path | bytes | Image.Image | np.ndarray


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a file, encoded bytes, a Pillow image or a uint8 array [height, width (, 1, 3 or 4)] as RGB.

    As in the published code, EXIF orientation is not applied and an alpha channel is dropped. Of an animation the first
    frame is read; 16-bit samples keep their high byte. `name` stands for the image in messages; a file's is its path.

    Raises ImageError for anything that is no whole image of a known format, or has more than MAX_PIXELS pixels.
    """
    if name is None:
        name = str(source) if isinstance(source, str | Path) else "image"
    try:
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source, name), name)
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        if source == b"":
            raise ImageError(f"{name}: empty, 0 bytes")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return _to_rgb(image, name)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: refused by its header's size: {error}") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ImageError(f"{name}: broken image: {error}") from error


def evaluation_transform(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """Resize to image_size × image_size (bicubic, aspect ratio not kept) and normalise.

    RGB images of any sizes → float32 [batch, 3, image_size, image_size]. Zero images give a batch of 0.
    """
    pixels = torch.empty(len(images), image_size, image_size, 3, dtype=torch.uint8)
    for row, image in zip(pixels, images, strict=True):
        row.copy_(torch.from_numpy(np.array(image.resize((image_size, image_size), Image.Resampling.BICUBIC))))
    return normalise(pixels)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] → float32 [batch, 3, height, width] with BLIP's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name}: arrays must be uint8 [height, width (, 1, 3 or 4)], got {array.dtype} {array.shape}")
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} × {height} pixels are more than {MAX_PIXELS:,}: scale it down first")
    if width * height == 0:
        raise ImageError(f"{name}: the image has no pixels ({width} × {height})")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range: convert it to 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip 16-bit samples at 255: an almost white picture.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(f"{name}: 32-bit pixels beyond 16 bits: convert it to 8 or 16 bits first")
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this detour; the palette's colours are kept
    return image.convert("RGB")
