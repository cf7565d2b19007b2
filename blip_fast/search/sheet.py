"""The contact sheet: the hits of a query as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from blip_fast.media.images import ImageError, ImageSource
from blip_fast.report import Card, Line, Report
from blip_fast.report.page import THUMBNAIL
from blip_fast.search.index import Hit, Index
from blip_fast.search.store import file_of, printable


def contact_sheet(index: Index, hits: Sequence[Hit], text: str | None = None,
                  image: ImageSource | None = None) -> Report:
    """A page of thumbnails, best first. Each is a link to its file, so that it can be reached by keyboard
    too.

    Args:
        text, image: the query, one of the two.

    Raises ImageError if the query's image cannot be read.
    """
    folder = os.path.commonpath([file_of(hit.image).parent for hit in hits]) if hits else ""
    reranked = sum(hit.itm is not None for hit in hits)
    order = f"matching head for {reranked}, then cosine" if reranked else "cosine"
    like = Path(image).name if isinstance(image, str | Path) else "this one"
    query = f"Images like {like}" if text is None else text
    report = Report(printable(query), facts={
        "images": f"{len(hits)} of {len(index):,}", "order": order, "model": printable(index.model_name),
        **({"folder": printable(folder)} if folder else {})})
    if image is not None:
        report.section("Query").cards([Card(image, [])])
    report.section("Found" if hits else "Nothing found", "" if hits else "The index holds no images.")
    return report.cards([_card(rank, hit, folder) for rank, hit in enumerate(hits, 1)])


def _card(rank: int, hit: Hit, folder: str) -> Card:
    name = printable(os.path.relpath(hit.image.name, folder))
    lines = [Line(name, f"{rank}", f"{hit.score:.3f}")]
    if hit.itm is not None:
        lines.append(Line("", f"match {100 * hit.itm:.1f} %", f"cosine {hit.itc:.3f}"))
    try:
        picture = hit.image.load()
    except ImageError as error:
        return Card(None, [*lines, Line(printable(str(error)), right=False)])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return Card(picture, lines, file_of(hit.image).as_uri(), name)
