"""The images that a command line names: files, folders of files, webdataset shards."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from blip_fast.images import SUFFIXES, ImageError, load_image


@dataclass(frozen=True)
class ImageInput:
    """One image, not read yet. `name` is its path, or `SHARD.tar/MEMBER`; a member is `size` bytes from `start` on."""

    name: str
    path: Path
    start: int = 0
    size: int | None = None

    def load(self) -> Image:
        """Raises ImageError for an image that cannot be read."""
        if self.size is None:
            return load_image(self.path)
        try:
            with self.path.open("rb") as shard:
                shard.seek(self.start)
                content = shard.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.name}: {error}") from error
        return load_image(content, self.name)


def expand(arguments: Sequence[str]) -> list[ImageInput]:
    """Files as they are, folders by the image files below them (sorted), `.tar` shards by the image members in them.

    Raises FileNotFoundError for a path that is not there, ValueError for a folder or shard without images.
    """
    return [image for argument in arguments for image in _expand(argument)]


def _expand(argument: str) -> list[ImageInput]:
    path = Path(argument)
    if path.is_dir():
        images = [ImageInput(str(file), file) for file in sorted(path.rglob("*"))
                  if file.suffix.lower() in SUFFIXES and file.is_file()]
    elif path.suffix.lower() == ".tar" and path.is_file():
        images = _shard(path)
    elif path.exists():
        return [ImageInput(argument, path)]
    else:
        raise FileNotFoundError(f"{argument}: no such image, folder or shard")
    if not images:
        raise ValueError(f"{argument} holds no images ({', '.join(sorted(SUFFIXES))})")
    return images


def _shard(path: Path) -> list[ImageInput]:
    """Headers alone are read; the images stay where they are until they are needed."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [ImageInput(f"{path}/{member.name}", path, member.offset_data, member.size) for member in tar
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole uncompressed tar file ({error}): copy or pack it again") from None
