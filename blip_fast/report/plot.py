"""Line plots and bars as SVG. Colours come from the page's style sheet, so that plots follow light and dark
mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 38  # margins for the tick labels and the axis title
MAX_POINTS = 240  # a longer series is drawn as the means of this many stretches
COLOURS = 6  # --series-0 … in page.css
BAR, BETWEEN_BARS, BETWEEN_GROUPS, GROUP_LABEL = 14, 3, 12, 16  # heights
FIGURE = 48  # width of the figure after a bar


@dataclass(frozen=True)
class Plot:
    """Lines over a common x axis. Points that are not finite are left out.

    `series` maps a line's name to its (x, y) points in order of x. `levels` are dashed horizontal lines to
    compare with, such as chance or a baseline.
    """

    title: str
    series: Mapping[str, Points]
    x_label: str = "step"
    y_label: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.series) <= COLOURS:
            raise ValueError(f"the plot {self.title!r} has {len(self.series)} lines: give 1 to {COLOURS}")

    def html(self) -> str:
        """A <figure>: the title, the legend with each line's last value, the drawing."""
        lines = {name: _thin([p for p in points if all(map(math.isfinite, p))])
                 for name, points in self.series.items()}
        levels = {name: y for name, y in self.levels.items() if math.isfinite(y)}
        legend = [_key(i, name, points[-1][1] if points else math.nan)
                  for i, (name, points) in enumerate(self.series.items())]
        legend += [_key(None, name, y) for name, y in levels.items()]
        return (f'<figure class="plot"><figcaption><strong>{escape(self.title)}</strong>'
                f'<ul class="legend">{"".join(legend)}</ul></figcaption>{self._svg(lines, levels)}</figure>')

    def _svg(self, lines: Mapping[str, Points], levels: Mapping[str, float]) -> str:
        xs = [x for points in lines.values() for x, _ in points]
        ys = [y for points in lines.values() for _, y in points]
        x_low, x_high = ((min(xs), max(xs)) if len(set(xs)) > 1
                         else (min(xs, default=0.0), min(xs, default=0.0) + 1))
        y_ticks = _ticks(*_spread([*ys, *levels.values()]))
        y_low, y_high = y_ticks[0], y_ticks[-1]

        def place_x(x: float) -> float:
            return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def place_y(y: float) -> float:
            return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">']
        for tick in y_ticks:
            parts.append(_horizontal("grid", place_y(tick)))
            parts.append(_text("tick", LEFT - 8, place_y(tick) + 4, _number(tick), "end"))
        for tick in _ticks(x_low, x_high):
            if x_low <= tick <= x_high:
                parts.append(_text("tick", place_x(tick), HEIGHT - BOTTOM + 18, _number(tick)))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(_text("axis", middle, HEIGHT - 4,
                           " · ".join(filter(None, (self.x_label, self.y_label)))))
        parts += [_horizontal("level", place_y(y)) for y in levels.values()]
        for i, points in enumerate(lines.values()):
            corners = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="curve" style="stroke:var(--series-{i})" points="{corners}"/>')
            parts += [f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3" '
                      f'style="fill:var(--series-{i})"/>'
                      for x, y in points[-1:]]
        if not xs:
            parts.append(_text("axis", middle, HEIGHT / 2, "no finite value"))
        return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0, with their values, in groups that compare the same names.

    `groups` maps a group's label to its bars: name → value. A name has the same colour in all groups, and a
    group may lack names. Bars that are negative or not finite are left out.
    """

    title: str
    groups: Mapping[str, Mapping[str, float]]
    unit: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self._names()) <= COLOURS:
            raise ValueError(f"the bars {self.title!r} have {len(self._names())} names: give 1 to {COLOURS}")

    def html(self) -> str:
        """A <figure>: the title with the unit, the legend, the drawing."""
        title = (f"<strong>{escape(self.title)}</strong>"
                 + (f" <small>{escape(self.unit)}</small>" if self.unit else ""))
        legend = "".join(_key(i, name) for i, name in enumerate(self._names()))
        return (f'<figure class="plot"><figcaption>{title}<ul class="legend">{legend}</ul></figcaption>'
                f"{self._svg()}</figure>")

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for bars in self.groups.values() for name in bars))

    def _svg(self) -> str:
        names = self._names()
        shown = {label: {name: v for name, v in bars.items() if math.isfinite(v) and v >= 0}
                 for label, bars in self.groups.items()}
        longest = max((value for bars in shown.values() for value in bars.values()), default=0.0) or 1.0
        parts, y = [], 0.0
        for label, bars in shown.items():
            parts.append(_text("tick", 0, y + GROUP_LABEL - 4, label, "start"))
            y += GROUP_LABEL
            for name, value in bars.items():
                width = value / longest * (WIDTH - FIGURE)
                parts.append(f'<rect x="0" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" '
                             f'style="fill:var(--series-{names.index(name)})"/>')
                parts.append(_text("tick", width + 6, y + BAR - 3, _number(value), "start"))
                y += BAR + BETWEEN_BARS
            y += BETWEEN_GROUPS
        return (f'<svg viewBox="0 0 {WIDTH} {y:.0f}" role="img" aria-label="{escape(self.title)}">'
                + "".join(parts) + "</svg>")


def _horizontal(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _key(series: int | None, name: str, value: float | None = None) -> str:
    """One entry of the legend: a swatch, the name, and the value if there is one."""
    swatch = ('<i class="dashes"></i>' if series is None
              else f'<i style="background:var(--series-{series})"></i>')
    figure = "" if value is None else f" <b>{_number(value)}</b>"
    return f"<li>{swatch}{escape(name)}{figure}</li>"


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points: a longer series becomes the means of that many stretches."""
    if len(points) <= MAX_POINTS:
        return points
    ends = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    stretches = [points[a:b] for a, b in pairwise(ends)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, widened if they are equal."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven multiples of 1, 2, 2.5 or 5 × 10ⁿ; the first is at most `low`, the last at least
    `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if 0 < abs(value) < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}"
