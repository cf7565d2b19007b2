"""The folder that CapFilt writes: shards that training reads, and the verdict on every text.

    000000.tar 000000.idx …  images with a kept text; a record's `captions` are its kept texts, `origins` their
                             origins, and `texts` all texts with scores and verdicts
    shards.json              written last, when all shards are complete
    dropped/                 the same for images without a kept text
    texts/000000.parquet …   the index of all texts, one row per text
    done/000000.json …       one file per finished shard, with the images that it refused
    quarantine.jsonl         the refused images of all shards
    capfilt.json             the options of the run
    weights.json             fingerprints of its models

A shard's number is the place of its tar among the run's tars. Each file is written under a temporary name and
renamed when it is complete, a shard's file in `done` last. A shard without that file is processed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from blip_fast.capfilt.clean import CapFiltRow
from blip_fast.data.shards.pack import QUARANTINE
from blip_fast.data.shards.shards import (
    PART,
    Sample,
    Shard,
    ShardIndex,
    ShardWriter,
    claim,
    part_of,
    replace_file,
    write_index,
)

OPTIONS, WEIGHTS = "capfilt.json", "weights.json"
DROPPED, TEXTS, DONE = "dropped", "texts", "done"


@dataclass(frozen=True)
class RefusedSample:
    """An image, or a tar, that could not be used."""

    image: str
    reason: str


@dataclass(frozen=True)
class Done:
    """A finished shard: the tar that it was made from, its tars of images with and without a kept text (None
    if there is no such image), and what was refused."""

    input: str
    kept: Shard | None
    dropped: Shard | None
    refused: tuple[RefusedSample, ...]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Done:
        kept, dropped = (Shard(**stored[name]) if stored[name] else None for name in ("kept", "dropped"))
        return cls(stored["input"], kept, dropped, tuple(RefusedSample(**each) for each in stored["refused"]))


class CleanFolder:
    """The folder of one run. Several processes may write to it, each its own shards."""

    def __init__(self, directory: str | Path) -> None:
        """Raises ValueError if pyarrow is not installed."""
        require_pyarrow()
        self.directory = Path(directory)

    def begin(self, options: dict[str, Any]) -> None:
        """Make the folder and record the run's options, or compare them with those of the run that began it.
        Options may still change until the models are recorded (`check_weights`), because no shard has been
        written before.

        Raises FileExistsError if the folder holds shards of something else, ValueError naming options that
        differ.
        """
        options = json.loads(json.dumps(options))  # in the form in which they are read back
        if not (self.directory / WEIGHTS).is_file():
            claim(self.directory)
            replace_file(self.directory / OPTIONS, _json(options))
        stored = json.loads((self.directory / OPTIONS).read_bytes())
        if differing := [name for name in {**stored, **options} if stored.get(name) != options.get(name)]:
            changes = ", ".join(f"{name} was {_abbreviate(stored.get(name))}, "
                                f"is {_abbreviate(options.get(name))}"
                                for name in differing)
            raise ValueError(f"{self.directory} was begun with other options ({changes}): "
                             "give the same, or name another folder")
        for name in (DROPPED, TEXTS, DONE):
            (self.directory / name).mkdir(exist_ok=True)

    @property
    def precision(self) -> str | None:
        """`dtype` of the run that began the folder; None if no run did."""
        path = self.directory / OPTIONS
        return json.loads(path.read_bytes()).get("dtype") if path.is_file() else None

    def check_weights(self, fingerprints: Sequence[str]) -> None:
        """Record the models' fingerprints, or raise ValueError if the folder was begun with other models."""
        path = self.directory / WEIGHTS
        if not path.is_file():
            replace_file(path, _json(list(fingerprints)))
        if json.loads(path.read_bytes()) != list(fingerprints):
            raise ValueError(f"{self.directory} was begun with other weights of the captioner or the filter: "
                             "name the same models and dtype, or another folder")

    def is_done(self, number: int) -> bool:
        return self._done_file(number).is_file()

    def done(self, number: int) -> Done:
        return Done.from_json(json.loads(self._done_file(number).read_bytes()))

    def shard(self, number: int) -> CleanShard:
        """The writer of shard `number`. Removes what an earlier attempt left."""
        for name in ("", DROPPED, TEXTS, DONE):
            for part in (self.directory / name).glob(f"{number:06d}.*{PART}"):
                part.unlink(missing_ok=True)
        return CleanShard(self.directory, number, self._done_file(number))

    def finish(self, count: int) -> list[Done]:
        """Write the quarantine and both indexes. All `count` shards must be done. A second call changes
        nothing."""
        every = [self.done(number) for number in range(count)]
        lines = [json.dumps(asdict(refused), ensure_ascii=False) + "\n" for done in every
                 for refused in done.refused]
        replace_file(self.directory / QUARANTINE, "".join(lines).encode("utf-8", "backslashreplace"))
        for name, shards in ((DROPPED, [done.dropped for done in every]),
                             ("", [done.kept for done in every])):
            written = tuple(shard for shard in shards if shard is not None)
            samples = sum(shard.samples for shard in written)
            write_index(ShardIndex(samples, samples if name == DROPPED else 0, written),
                        self.directory / name)
        return every

    def _done_file(self, number: int) -> Path:
        return self.directory / DONE / f"{number:06d}.json"


class CleanShard:
    """Writes one shard. As a context manager it removes unfinished files."""

    def __init__(self, directory: Path, number: int, done_file: Path) -> None:
        self._directory, self._stem, self._done_file = directory, f"{number:06d}", done_file
        self._writers = {True: ShardWriter(directory / f"{self._stem}.tar"),
                         False: ShardWriter(directory / DROPPED / f"{self._stem}.tar")}
        self._texts: list[dict[str, Any]] = []

    def add(self, key: str, content: bytes, record: dict[str, Any], rows: Sequence[CapFiltRow]) -> None:
        """Add an image with its record and its texts."""
        kept = [row for row in rows if row.kept]
        if not re.fullmatch(r"[^./\s\ud800-\udfff]{1,90}", key):
            key = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        texts = [asdict(row) for row in rows]
        file = f"{self._stem}.tar" if kept else f"{DROPPED}/{self._stem}.tar"
        self._texts += [{"file": file, "key": key, **text} for text in texts]
        for text in texts:
            del text["image"]
        self._writers[bool(kept)].write(Sample(key, content, {
            **record, "captions": [row.text for row in kept], "origins": [row.origin for row in kept],
            "texts": texts}))

    def finish(self, source: str, refused: Sequence[RefusedSample]) -> None:
        """Complete and rename all files. `source` is the tar that they were made from."""
        kept, dropped = (self._writers[key].finish() if self._writers[key].samples else None
                         for key in (True, False))
        self._write_texts()
        done = Done(source, kept, dropped, tuple(refused))
        replace_file(self._done_file, _json(asdict(done)))

    def _write_texts(self) -> None:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

        path = self._directory / TEXTS / f"{self._stem}.parquet"
        string, number, verdict = pyarrow.string(), pyarrow.float32(), pyarrow.bool_()
        schema = pyarrow.schema([("file", string), ("key", string), ("image", string), ("text", string),
                                 ("origin", string), ("itm", number), ("itc", number), ("kept", verdict),
                                 ("cut", verdict)])
        parquet.write_table(pyarrow.Table.from_pylist(self._texts, schema), part_of(path))
        part_of(path).replace(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(*error)


def require_pyarrow() -> None:
    """Raise ValueError if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise ValueError("CapFilt's index of texts needs pyarrow, which is not installed: pip install "
                         "'blip-fast[capfilt]'")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
