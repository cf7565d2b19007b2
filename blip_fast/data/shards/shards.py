"""Shards: images and their records in webdataset tar files, with an index.

A directory holds `000000.tar`, `000001.tar`, …, for each an index of its members, `000000.idx`, and
`shards.json`. A sample is two members of a tar:

    000000042.jpg    the encoded image, unchanged (jpg, png or webp)
    000000042.json   its record: key, id, crc32, image (path), captions, and all other annotation fields

`id` is the image's identity for contrastive targets: equal ids mean the same image. Without an `id` in the
annotations it is derived from the image's content. `crc32` is the checksum of the encoded image; the training
pipeline compares it, so that an image damaged on disk never reaches the decoder. A pair of images (NLVR2) has
a third member, `000000042.second.jpg`, and its checksum `second_crc32`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any, Self

import fsspec
from webdataset.writer import TarWriter

from blip_fast.data.shards.integrity import image_format

INDEX = "shards.json"
PART = ".part"  # suffix of files being written
SECOND = "second."  # prefix of the extension of a pair's second image


@dataclass(frozen=True)
class Sample:
    """One encoded image, or a pair of images, and its record. `key` holds no dot, slash or white space.

    `write_shards` adds `key` and checksums to the record, and `image`, `id` and `captions` if they are
    missing.
    """

    key: str
    image: bytes
    record: dict[str, Any]
    second: bytes | None = None


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The content of a directory of shards, as in `shards.json`: the number of samples, of samples with
    neither caption nor question, and of `pairs` of images."""

    samples: int
    without_caption: int
    shards: tuple[Shard, ...]
    pairs: int = 0


def write_shards(samples: Iterable[Sample], directory: str | Path, *,
                 samples_per_shard: int = 1000) -> ShardIndex:
    """Write samples, in order, as tar files and an index. The same samples give the same bytes.

    Raises FileExistsError if the directory already holds shards, ValueError for samples that cannot be
    stored.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; "
                         "a shard needs room for one sample at least")
    directory = claim(directory)
    shards: list[Shard] = []
    without_caption = pairs = 0
    left = iter(samples)
    for first in left:
        with ShardWriter(directory / f"{len(shards):06d}.tar") as tar:
            for sample in chain([first], islice(left, samples_per_shard - 1)):
                tar.write(sample)
                without_caption += not (sample.record.get("captions") or "question" in sample.record)
                pairs += sample.second is not None
            shards.append(tar.finish())
    index = ShardIndex(sum(shard.samples for shard in shards), without_caption, tuple(shards), pairs)
    write_index(index, directory)
    return index


def write_index(index: ShardIndex, directory: Path) -> None:
    """Write `shards.json`. Call it when all shards are written."""
    replace_file(directory / INDEX, (json.dumps(asdict(index), indent=2) + "\n").encode())


class ShardWriter:
    """Writes a tar file under a temporary name; `finish` renames it. As a context manager it removes an
    unfinished file."""

    def __init__(self, path: Path) -> None:
        self._path, self._part, self.samples = path, part_of(path), 0
        self._stream = self._part.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)

    def write(self, sample: Sample) -> None:
        """Raises ValueError for a sample that cannot be stored."""
        self._tar.write(_members_of(sample))
        self.samples += 1

    def finish(self) -> Shard:
        """Close the tar, write its index of members, and give both their final names."""
        self._tar.close()
        _sync(self._stream)
        self._stream.close()
        replace_file(self._path.with_suffix(".idx"), member_index(self._part).encode())
        self._part.replace(self._path)
        return Shard(self._path.name, self.samples, self._path.stat().st_size, sha256_of(self._path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The temporary name under which this process writes `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}{PART}")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: it is whole or absent, whenever the process or the machine dies."""
    part = part_of(path)
    with part.open("wb") as stream:
        stream.write(content)
        _sync(stream)
    part.replace(path)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def claim(directory: str | Path) -> Path:
    """Make the directory for new shards. Raises FileExistsError if it already holds shards."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.tar")) or (directory / INDEX).exists():
        raise FileExistsError(f"{directory} holds shards already: remove them or name another directory")
    return directory


def is_url(root: str | Path) -> bool:
    """Whether `root` is read by fsspec and not from the file system."""
    return "://" in str(root)


def read_index(root: str | Path) -> ShardIndex:
    """Read `shards.json` of a directory or URL. It is written last, so shards without it are incomplete.

    Raises FileNotFoundError if it, or in a directory one of its tar files, is missing; ValueError if it is no
    index or a tar file's size is wrong; OSError if the URL cannot be read. Tar files under a URL are checked
    when they are fetched.
    """
    where = f"{str(root).rstrip('/')}/{INDEX}"
    try:
        system, path = fsspec.url_to_fs(where)
        stored = json.loads(system.cat_file(path))
        index = ShardIndex(**{**stored, "shards": tuple(Shard(**shard) for shard in stored["shards"])})
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root} holds no {INDEX}: pack the images there with `blip-fast data pack` first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no index of shards ({error}): copy it again") from None
    except Exception as error:  # each protocol's client has its own errors
        raise OSError(f"{where} cannot be read: {error}") from error
    if not is_url(root):
        _check_files(Path(root), index)
    return index


def _check_files(directory: Path, index: ShardIndex) -> None:
    for shard in index.shards:
        tar = directory / shard.file
        if not tar.is_file():
            raise FileNotFoundError(
                f"{directory / INDEX} lists {shard.file}, which is missing: "
                "copy it again, or pack the images again"
            )
        if tar.stat().st_size != shard.bytes:
            raise ValueError(f"{tar} has {tar.stat().st_size:,} of {shard.bytes:,} bytes: copy it again")


class OpenShard:
    """An open local tar file and its members' places. Several threads can read samples at once, in any order.
    `name` is its name in messages."""

    def __init__(self, tar: Path, name: str) -> None:
        self.name = name
        self._stream, self._lock = tar.open("rb"), threading.Lock()
        _, *lines = tar.with_suffix(".idx").read_text(encoding="utf-8").splitlines()
        self._members = [self._member_places(line.split()) for line in lines]

    @staticmethod
    def _member_places(fields: list[str]) -> dict[str, tuple[int, int]]:
        """Offset and size of a sample's record (key `json`), image (key "") and second image (key `second.`),
        from the fields of its line in the index."""
        members = ((fields[i], (int(fields[i + 1]), int(fields[i + 2]))) for i in range(0, len(fields), 4))
        return {name if name == "json" else SECOND * name.startswith(SECOND): place
                for name, place in members}

    def read(self, number: int, pair: bool = False) -> tuple[list[bytes], bytes]:
        """The encoded image of a sample, or both images of a pair, and the record's JSON."""
        members = self._members[number]
        read = [self.read_at(*members[name]) for name in ("", *[SECOND] * pair, "json")]
        return read[:-1], read[-1]

    def read_at(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on."""
        if hasattr(os, "pread"):
            return os.pread(self._stream.fileno(), size, start)
        with self._lock:  # on Windows all threads share one position in the file
            self._stream.seek(start)
            return self._stream.read(size)

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


def iterate(directory: str | Path) -> Iterator[Sample]:
    """All samples of a directory of shards, in order. The images stay encoded; decode them by
    `images.load_image`."""
    directory = Path(directory)
    for shard in read_index(directory).shards:
        with tarfile.open(directory / shard.file) as tar:
            members = ((member.name, tar.extractfile(member)) for member in tar)
            contents = ((name.split(".", 1), stream.read()) for name, stream in members if stream)
            for key, pair in groupby(contents, key=lambda content: content[0][0]):
                parts = {extension: content for (_, extension), content in pair}
                record = json.loads(parts.pop("json"))
                second = next((parts.pop(name) for name in list(parts) if name.startswith(SECOND)), None)
                (image,) = parts.values()
                yield Sample(key, image, record, second)


def _members_of(sample: Sample) -> dict[str, Any]:
    pictures = {"": sample.image} | ({SECOND: sample.second} if sample.second is not None else {})
    kinds = {prefix: image_format(content) for prefix, content in pictures.items()}
    if None in kinds.values():
        raise ValueError(f"sample {sample.key} is neither JPEG, PNG nor WebP: convert it first")
    if not re.fullmatch(r"[^./\s]{1,90}", sample.key):
        raise ValueError(f"key {sample.key!r} must have 1 to 90 characters, none of them a dot, "
                         "a slash or white space")
    identity = int.from_bytes(hashlib.sha256(sample.image).digest()[:8]) >> 1  # fits an int64
    known = {"image": sample.key, "id": identity, "captions": [], **sample.record}
    sums = {f"{prefix.replace('.', '_')}crc32": zlib.crc32(content) for prefix, content in pictures.items()}
    members = {f"{prefix}{kinds[prefix]}": content for prefix, content in pictures.items()}
    record = json.dumps({**known, "key": sample.key, **sums}, ensure_ascii=False)
    return {"__key__": sample.key, **members, "json": record.encode()}


def member_index(path: Path) -> str:
    """One line per sample: extension, offset, size and name of each member (DALI's index file format)."""
    with tarfile.open(path) as tar:
        members = [(*member.name.split(".", 1), member.offset_data, member.size) for member in tar]
    lines = [
        " ".join(f"{extension} {offset} {size} {key}.{extension}" for _, extension, offset, size in sample)
        for key, sample in groupby(members, key=lambda member: member[0])
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
