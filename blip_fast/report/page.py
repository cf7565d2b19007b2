"""The page: sections of metrics, tables, plots and picture cards in one HTML file.

The file contains everything (style sheet, drawings, pictures as data URIs), so it opens anywhere without a
network. Every text is escaped and there is no script, so a caption can do no harm.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median

from PIL import Image

from blip_fast.media.images import ImageSource, load_image
from blip_fast.report.plot import Bars, Plot

THUMBNAIL = 360  # longest side of a picture in the page
LOSSLESS = 160  # pictures up to this size are stored losslessly


@dataclass(frozen=True)
class Metric:
    """One figure of a run, its target and its chance level (None if there is none).

    Without `unit` the value is a share of 1 and is shown in per cent. With `unit`, such as "nats per token",
    the number is shown as it is. The target is met at or above it; with `lower_is_better`, at or below it.
    """

    name: str
    value: float
    target: float | None = None
    chance: float | None = None
    unit: str | None = None
    lower_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


@dataclass(frozen=True)
class Line:
    """One text of a card. `label` says whose text it is, `right` marks it as right or wrong, `struck` strikes
    it out."""

    text: str
    label: str = ""
    score: str = ""
    right: bool | None = None
    struck: bool = False


@dataclass(frozen=True)
class Card:
    """A picture with its texts, or an empty frame if `image` is None. `link` is the picture's link, `alt` its
    alternative text."""

    image: ImageSource | None
    lines: Sequence[Line]
    link: str | None = None
    alt: str = ""


class Report:
    """Collects the parts of a page in order, and writes it. Each part belongs to the section opened last."""

    def __init__(self, title: str, subtitle: str = "", facts: Mapping[str, str] | None = None) -> None:
        """`facts` are short pairs under the title: model size, duration, seed."""
        self.title, self.subtitle, self.facts = title, subtitle, dict(facts or {})
        self._sections: list[list[str]] = []

    def section(self, heading: str, text: str = "") -> Report:
        """Open a section, with a sentence about what it shows."""
        self._sections.append([f"<h2>{escape(heading)}</h2>", *([f"<p>{escape(text)}</p>"] if text else [])])
        return self

    def metrics(self, metrics: Sequence[Metric]) -> Report:
        """Figures with bars, targets and, where there are any, chance levels."""
        with_chance = any(metric.chance is not None for metric in metrics)
        head = ('<th>Measure</th><th class="number">Value</th><th></th>'
                '<th class="number"><i class="target"></i>Target</th>'
                + '<th class="number"><i class="chance"></i>Chance</th>' * with_chance)
        rows = "".join(_metric(metric, with_chance) for metric in metrics)
        return self._add(f'<table class="metrics"><thead><tr>{head}</tr></thead>'
                         f"<tbody>{rows}</tbody></table>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | float]],
              caption: str = "") -> Report:
        """A plain table; columns of numbers are right-aligned. Raises ValueError if a row lacks one cell per
        column."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of the table has {len(row)} cells for {len(columns)} columns: "
                                 f"{row!r}")
        numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows)
                   for i in range(len(columns))]
        kinds = [' class="number"' if n else "" for n in numeric]
        head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        body = "".join("<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>"
                                        for cell, kind in zip(row, kinds, strict=True))
                       + "</tr>" for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        return self._add(f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>'
                         f"<tbody>{body}</tbody></table></div>")

    def plots(self, plots: Sequence[Plot | Bars]) -> Report:
        """Line plots and bars, side by side where there is room."""
        return self._add("".join(plot.html() for plot in plots), "plots")

    def cards(self, cards: Sequence[Card]) -> Report:
        """Pictures with their texts. Raises ImageError for a picture that cannot be read."""
        return self._add("".join(_cards(cards)), "cards")

    def write(self, path: str | Path) -> Path:
        """Write the page, make its directory if needed, and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def html(self) -> str:
        style = files("blip_fast.report").joinpath("page.css").read_text(encoding="utf-8")
        facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in self.facts.items())
        head = [f"<h1>{escape(self.title)}</h1>", f"<p>{escape(self.subtitle)}</p>" if self.subtitle else "",
                f'<dl class="facts">{facts}</dl>' if facts else ""]
        sections = "\n".join(f"<section>{''.join(parts)}</section>" for parts in self._sections)
        return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                f"<title>{escape(self.title)}</title>"
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<style>\n{style}</style></head>\n<body><header>{''.join(head)}</header>\n{sections}\n"
                "</body></html>\n")

    def _add(self, html: str, kind: str = "") -> Report:
        if not self._sections:
            raise ValueError("open a section first: report.section(heading)")
        self._sections[-1].append(f'<div class="block {kind}">{html}</div>')
        return self


def _metric(metric: Metric, with_chance: bool) -> str:
    mark = _mark(metric.met) if metric.met is not None else ""
    side = "".join(f'<td class="side number" data-name="{name}">{_figure(value, metric.unit)}</td>'
                   for name, value in [
                       ("target", metric.target), ("chance", metric.chance)][: 1 + with_chance])
    unit = f" <small>{escape(metric.unit)}</small>" if metric.unit else ""
    return (f'<tr><td>{escape(metric.name)}{unit}</td><td class="value number">{mark}'
            f'{_figure(metric.value, metric.unit)}</td><td class="bar">{_bar(metric)}</td>{side}</tr>')


def _bar(metric: Metric) -> str:
    """The value as a bar from 0. The full length is 1 for shares, otherwise 1.1 × the largest of the
    figures."""
    known = [v for v in (metric.value, metric.target, metric.chance) if v is not None and math.isfinite(v)]
    full = 1.0 if metric.unit is None else 1.1 * max([*known, 0.0]) or 1.0
    parts = []
    for kind, side, value in (("fill", "width", metric.value), ("chance", "left", metric.chance),
                              ("target", "left", metric.target)):
        if value is not None and math.isfinite(value):
            parts.append(f'<i class="{kind}" '
                         f'style="{side}:{100 * min(max(value / full, 0.0), 1.0):.1f}%"></i>')
    return f'<span class="track" aria-hidden="true">{"".join(parts)}</span>'


def _figure(value: float | None, unit: str | None) -> str:
    if value is None or not math.isfinite(value):
        return "–" if value is None else "not finite"
    return f"{100 * value:.1f} %" if unit is None else f"{value:.3g}"


def _mark(right: bool) -> str:
    kind, sign, label = ("good", "✓", "yes") if right else ("bad", "✗", "no")
    return f'<span class="mark {kind}" role="img" aria-label="{label}">{sign}</span> '


def _cell(cell: str | float) -> str:
    return escape(cell) if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"


def _cards(cards: Sequence[Card]) -> list[str]:
    pictures = [None if card.image is None else _thumbnail(load_image(card.image)) for card in cards]
    aspects = [picture.width / picture.height for picture in pictures if picture is not None]
    style = f"--aspect:{min(max(median(aspects) if aspects else 1.0, 0.75), 1.5):.3f}"
    return [f'<article class="card" style="{style}">{_frame(picture, card)}'
            f"<ul>{''.join(map(_line, card.lines))}</ul></article>"
            for card, picture in zip(cards, pictures, strict=True)]


def _frame(picture: Image.Image | None, card: Card) -> str:
    shown = '<div class="empty"></div>'
    if picture is not None:
        shown = f'<img alt="{escape(card.alt)}" loading="lazy" src="{_data_uri(picture)}">'
    return shown if card.link is None else f'<a href="{escape(card.link)}">{shown}</a>'


def _line(line: Line) -> str:
    label = ""
    if line.label or line.score:
        label = f'<span class="label">{escape(line.label)}<b>{escape(line.score)}</b></span>'
    mark = "" if line.right is None else _mark(line.right)
    text = f'<span class="struck">{escape(line.text)}</span>' if line.struck else escape(line.text)
    return f"<li>{label}{mark}{text}</li>"


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture.thumbnail((THUMBNAIL, THUMBNAIL))  # in place, never enlarges
    return picture


def _data_uri(picture: Image.Image) -> str:
    kind, options = (("png", {}) if max(picture.size) <= LOSSLESS
                     else ("jpeg", {"quality": 82, "optimize": True}))
    encoded = io.BytesIO()
    picture.save(encoded, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
