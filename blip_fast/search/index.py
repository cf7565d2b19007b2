"""An index of images on disk: filled, updated, and searched by text or by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from blip_fast.data.shards.named_images import expand
from blip_fast.data.shards.shard_cache import CACHE, shard_cache
from blip_fast.data.shards.shards import is_url
from blip_fast.inference.precision import resolve
from blip_fast.media.images import ImageError, ImageSource, StoredImage, local_path
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.search.adding import Adding, AddReport
from blip_fast.search.approximate import BACKENDS, graph_of, nearest_rows
from blip_fast.search.embedding import fingerprint, image_features, match_logits, text_feature
from blip_fast.search.store import Store, printable
from blip_fast.search.topk import top_rows
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.model_loading import as_sources, chosen_device, pixel_batches


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    `itc` is the cosine of its contrastive features with the query's. If the matching head scored the image,
    `itm` is the probability that text and image match, and `score` is its 'matched' logit + `itc` (as
    published, BLIP section 5.1); otherwise `score` is `itc`. `error` says why an image could not be read for
    re-ranking.
    """

    image: StoredImage
    score: float
    itc: float
    itm: float | None = None
    error: str | None = None


class Index:
    """An index directory of images' ITC features, with the model that computed them.

        index = Index.create("photos.index", "Salesforce/blip-itm-base-coco")
        index.add(["photos/", "shards/000000.tar"])
        for hit in index.query(text="a dog on grass"):
            print(hit.image.name, hit.score)

    The model is loaded when it is first needed. `add` may be interrupted at any moment and called again.
    """

    def __init__(self, store: Store, *, model: str | None = None, device: str | None = None,
                 threads: int | None = None, matcher: Matcher | None = None) -> None:
        """Use `create` or `open`."""
        self._store, self._model, self._matcher = store, model, matcher
        self._running = {"device": device, "threads": threads}

    @classmethod
    def create(cls, directory: str | Path, model: str | Path, *, storage: str = "float32",
               dtype: str = "auto", device: str | None = None, image_size: int | None = None,
               heads: int | None = None, tokenizer: str | Path | None = None,
               threads: int | None = None) -> Self:
        """Make an empty index.

        Args:
            directory: where to make the index; created if missing.
            model: an image-text retrieval or pre-training checkpoint. The model and the options after
                `storage` are those of `load_for_task`. All but `device` and `threads` are stored in the
                index, `dtype` `auto` as the dtype that it means on this device.
            storage: `float32`, or `float16` in half the space, with cosines accurate to about 0.0003.

        Raises:
            FileExistsError: there is an index already.
            ValueError: the storage is unknown, or `Matcher.from_pretrained` refuses the model or an option.
        """
        options = {"dtype": resolve(dtype, chosen_device(device)), "image_size": image_size, "heads": heads,
                   "tokenizer": _absolute(tokenizer)}
        matcher = Matcher.from_pretrained(model, device=device, threads=threads, **options)
        facts = {"model": _absolute(model), "options": options, "fingerprint": fingerprint(matcher.model)}
        store = Store.create(directory, matcher.model.config.embed_dim, storage, facts)
        return cls(store, matcher=matcher)

    @classmethod
    def open(cls, directory: str | Path, *, model: str | Path | None = None, device: str | None = None,
             threads: int | None = None) -> Self:
        """Open an index.

        Args:
            model: the new location of the index's model, if it has moved.
            device, threads: as in `load_for_task`.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: the index is damaged or of another format.
        """
        return cls(Store(directory), model=None if model is None else str(model), device=device,
                   threads=threads)

    def close(self) -> None:
        self._store.close()

    def __len__(self) -> int:
        """The number of images that can be found."""
        return len(self._store)

    @property
    def model_name(self) -> str:
        """The checkpoint that the index was made with."""
        return self._store.facts["model"]

    @property
    def options(self) -> dict[str, str | int | None]:
        """The options of the index: dtype, image_size, heads and tokenizer of the model, and storage of the
        features."""
        return {**self._store.facts["options"], "storage": self._store.facts["storage"]}

    @property
    def matcher(self) -> Matcher:
        """The index's model. Raises ValueError if the model that was loaded is a different one."""
        if self._matcher is None:
            source, facts = self._model or self.model_name, self._store.facts
            matcher = Matcher.from_pretrained(source, **self._running, **facts["options"])
            if fingerprint(matcher.model) != facts["fingerprint"]:
                raise ValueError(f"{source} is another model than the one that the index "
                                 f"{self._store.directory} was made with ({self.model_name}): "
                                 "name that one, or index into another directory")
            self._matcher = matcher
        return self._matcher

    def add(self, sources: Sequence[str | Path], *,
            progress: Callable[[AddReport], None] | None = None) -> AddReport:
        """Index images that are new or have changed, judged by size and modification time.

        An image is identified by its absolute path; an image in a shard by the shard's path and the member's
        name. An image that cannot be read is listed in the index's `broken.jsonl` and tried again next time.

        Args:
            sources: image files, folders of images, webdataset shards (`.tar`).
            progress: called after each image with the counts so far.

        Raises:
            FileNotFoundError: a source does not exist.
            ValueError: a folder or shard has no images, another process is adding, or the model is not the
                index's.
        """
        images = expand([_local_path(source) for source in sources], shard_cache(CACHE, 0.0))
        adding = Adding(self._store, self.matcher.model, progress)
        with self._store.writing():
            try:
                adding.run(images)
            finally:
                self._store.report_broken()
        return adding.report

    def missing(self) -> Iterator[str]:
        """Names of indexed images that are missing: the file is gone, or its shard was rewritten and the
        image has not been found in it since."""
        return self._store.missing()

    def prune(self) -> int:
        """Remove the images that are `missing`, and free the space of their features and of outdated ones.
        Returns the number of removed images.

        Raises ValueError if another process is adding.
        """
        with self._store.writing():
            before = len(self)
            self._store.drop(self._store.missing())
            self._store.compact()
            self._store.report_broken()
        return before - len(self)

    def query(self, text: str | None = None, image: ImageSource | None = None, *, top: int = 20,
              rerank: int = 64, first_token: str = "[ENC]", backend: str = "exact") -> list[Hit]:
        """The images that match a text, or look like an image, best first.

        The candidates are the images with the largest cosines; of equal cosines the image added first comes
        first. For a text, the matching head then scores the best candidates again, image by image, from their
        files. Candidates that it did not score, or that can no longer be read, follow in the order of their
        cosines.

        Args:
            text, image: the query, one of the two.
            top: the number of images wanted.
            rerank: the number of candidates that the matching head scores; 0 uses cosines alone. Ignored for
                an image.
            first_token: as in `retrieve`: `[ENC]` as in training and in the published retrieval evaluation.
            backend: `exact`, or `faiss` or `usearch`, which find most of the same candidates in less time.
                Their graph is updated first and stored in the index.

        Raises:
            ImageError: the query's image cannot be read.
            ValueError: neither or both of text and image are given, the text has no token, a number is too
                small, the first token or the backend is unknown, or the model is not the index's.
            ModuleNotFoundError: the backend is not installed.
        """
        if (text is None) == (image is None):
            raise ValueError("a query is either a text or an image: give one of them")
        if top < 1 or rerank < 0:
            raise ValueError(f"top must be at least 1 and rerank at least 0, got {top} and {rerank}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        model = self.matcher.model
        if image is not None:
            (pixels,) = pixel_batches(as_sources(image), model.config.vision.image_size, 1)
            return self._candidates(image_features(model, pixels)[0], top, backend)
        packed = self.matcher.pack([str(text)], first_token)
        query = text_feature(model, packed.with_first(model.config.tokens.cls))
        hits = self._candidates(query, max(top, rerank), backend)
        return (self._rerank(packed, hits[:rerank]) + hits[rerank:])[:top]

    def _candidates(self, query: NDArray[np.float32], count: int, backend: str) -> list[Hit]:
        store, generation = self._store, self._store.generation
        graph = None if backend == "exact" else graph_of(store, backend)
        with store.snapshot():
            if graph is None:
                rows, cosines = top_rows(store.blocks(), query, count, store.holes())
            elif generation != store.generation:
                raise ValueError(f"the index {store.directory} was pruned meanwhile: ask again")
            else:
                found = nearest_rows(graph, store.holes(), query, count)
                order, cosines = top_rows([(0, store.rows(found))], query, count, np.empty(0, np.int64))
                rows = found[order]
            images = store.images(rows)
        return [Hit(image, cosine, cosine) for image, cosine in zip(images, cosines.tolist(), strict=True)]

    def _rerank(self, text: PackedTexts, hits: list[Hit]) -> list[Hit]:
        """The hits in the order of the matching head's scores; those that cannot be read come last."""
        logits = match_logits(self.matcher.model, text, (hit.image for hit in hits))
        seen, unread = [], []
        for hit, result in zip(hits, logits, strict=True):
            if isinstance(result, ImageError):
                unread.append(replace(hit, error=printable(str(result))))
            else:
                seen.append(replace(hit, score=float(result[1]) + hit.itc, itm=float(result.softmax(0)[1])))
        return sorted(seen, key=lambda hit: -hit.score) + unread


def _absolute(source: str | Path | None) -> str | None:
    """A path made absolute; the name of a model on the Hub unchanged."""
    if source is None:
        return None
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _local_path(source: str | Path) -> str:
    """A source's resolved path. Raises ValueError for a URL of another machine."""
    if is_url(source) and not str(source).startswith("file:"):
        raise ValueError(f"{source}: an index holds images of this machine: fetch the shards first")
    return str(Path(local_path(str(source))).resolve())
