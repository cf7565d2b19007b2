"""Images for inference: read anything safely as RGB, and BLIP's evaluation transform, exactly as published.

Everything here is Pillow on the CPU: the results equal those of transformers' BlipImageProcessor bit for bit,
up to float32 rounding of the normalisation. Training reads its images through DALI instead
(`data/input/pipeline.py`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 80_000_000  # 240 MB as RGB; what a header promises is checked before anything is decoded

# Formats whose readers are plain decoders; Pillow's EPS reader, for one, runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2",
                      ".avif"))

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Container(Protocol):
    """A file that holds many images, as a tar does."""

    def read(self, start: int, size: int) -> bytes: ...


@dataclass(frozen=True)
class StoredImage:
    """An image that is not read yet: a file, or `size` bytes of a container from `start` on. `name` stands
    for it."""

    name: str
    where: Path | Container
    start: int = 0
    size: int = 0

    def load(self) -> Image.Image:
        """Raises ImageError for an image that cannot be read."""
        return load_image(self)

    def pixels(self, image_size: int, name: str | None = None) -> Tensor:
        """As `image_pixels`."""
        return evaluation_transform([load_image(self, name)], image_size)[0]

    def read(self) -> bytes:
        """The encoded image. Raises OSError where it cannot be read."""
        if isinstance(self.where, Path):
            return self.where.read_bytes()
        return self.where.read(self.start, self.size)


ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor | StoredImage


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


Result = TypeVar("Result")


def unless_error(result: Result | ImageError) -> Result:
    """Return what was made of an image, or raise the error that stands in its place."""
    if isinstance(result, ImageError):
        raise result
    return result


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read an image as RGB.

    As in the published code, EXIF orientation is not applied and an alpha channel is dropped. Of an animation
    the first frame is read; 16-bit samples keep their high byte.

    Args:
        source: a path, a `file://` URL, encoded bytes, a Pillow image, an array uint8 [height, width (, 1, 3
            or 4)], a tensor uint8 [(1, 3 or 4,) height, width] or a StoredImage.
        name: stands for the image in messages (default: `name_of`).

    Raises:
        ImageError: it is no whole image of a known format, or has more than MAX_PIXELS pixels.
    """
    name = name or name_of(source)
    try:
        if isinstance(source, StoredImage):
            source = source.where if isinstance(source.where, Path) else source.read()
        if isinstance(source, Tensor):
            source = _channels_last(source, name)
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source, name), name)
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        if source == b"":
            raise ImageError(f"{name}: empty, 0 bytes")
        file = io.BytesIO(source) if isinstance(source, bytes) else local_path(source)
        with Image.open(file, formats=FORMATS) as image:
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


def name_of(source: ImageSource, otherwise: str = "image") -> str:
    """What stands for the image in messages and results: its path, URL or name, where it has one."""
    if isinstance(source, StoredImage):
        return source.name
    return str(source) if isinstance(source, str | Path) else otherwise


def image_pixels(source: ImageSource, image_size: int, name: str | None = None) -> Tensor:
    """Any image → float32 [3, image_size, image_size], after the evaluation transform; a video that is not
    read yet (`data/shards/videos.py`) → [frames, 3, image_size, image_size].

    A floating-point tensor of that shape is taken to be there already.

    Raises:
        ImageError: as `load_image`; floating-point pixels of another shape, or whose range suggests that they
            are not normalised.
    """
    if isinstance(source, Tensor) and source.is_floating_point():
        return _checked_pixels(source, image_size, name or "image")
    if isinstance(source, StoredImage):
        return source.pixels(image_size, name)
    return evaluation_transform([load_image(source, name)], image_size)[0]


def evaluation_transform(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """Resize to image_size × image_size (bicubic, aspect ratio not kept) and normalise.

    RGB images of any sizes → float32 [batch, 3, image_size, image_size]. Zero images give a batch of 0.
    """
    pixels = torch.empty(len(images), image_size, image_size, 3, dtype=torch.uint8)
    for row, image in zip(pixels, images, strict=True):
        row.copy_(torch.from_numpy(resized(image, image_size)))
    return normalise(pixels)


def resized(image: Image.Image, image_size: int) -> np.ndarray:
    """RGB of any size → uint8 [image_size, image_size, 3], as in `evaluation_transform`, which leaves the
    size of the result as it is."""
    return np.array(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] → float32 [batch, 3, height, width] with BLIP's mean and standard
    deviation."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


def local_path(source: str | Path) -> str | Path:
    """The path that a `file://` URL names; a path as it is."""
    if isinstance(source, Path) or not _URL.match(source):
        return source
    url = urlsplit(source)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise ImageError(f"{source}: only URLs of files on this machine (file:///…) can be read: download it "
                         "first")
    return url2pathname(url.path)


def _checked_pixels(pixels: Tensor, image_size: int, name: str) -> Tensor:
    wanted = [3, image_size, image_size]
    if list(pixels.shape) != wanted:
        raise ImageError(f"{name}: floating-point pixels must be {wanted}, as evaluation_transform gives "
                         f"them, got {list(pixels.shape)}: pass uint8 for images of other sizes")
    low, high = (value.item() for value in pixels.aminmax())
    if not -10 <= low <= high <= 10 or (low >= 0 and high <= 1):  # normalised black is −1.8, white 2.1
        raise ImageError(f"{name}: floating-point pixels from {low:.3g} to {high:.3g} do not look "
                         "normalised: pass uint8, or normalise them first (blip_fast.media.images)")
    return pixels.to(torch.float32)


def _channels_last(tensor: Tensor, name: str) -> np.ndarray:
    """uint8 [(channels,) height, width] → [height, width (, channels)]."""
    is_image = tensor.ndim == 2 or (tensor.ndim == 3 and len(tensor) in (1, 3, 4))
    if tensor.dtype != torch.uint8 or not is_image:
        raise ImageError(f"{name}: tensors must be uint8 [(1, 3 or 4,) height, width], or floating-point "
                         f"pixels after the evaluation transform, got {tensor.dtype} {list(tensor.shape)}")
    return (tensor if tensor.ndim == 2 else tensor.permute(1, 2, 0)).cpu().numpy()


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image:
        raise ImageError(f"{name}: arrays must be uint8 [height, width (, 1, 3 or 4)], got {array.dtype} "
                         f"{array.shape}")
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} × {height} pixels are more than {MAX_PIXELS:,}: scale it down "
                         "first")
    if width * height == 0:
        raise ImageError(f"{name}: the image has no pixels ({width} × {height})")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range: convert it to 8 or 16 bits "
                         "first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip 16-bit samples at 255: an almost white picture.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(f"{name}: 32-bit pixels beyond 16 bits: convert it to 8 or 16 bits first")
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this detour; the palette's colours are kept
    return image.convert("RGB")
