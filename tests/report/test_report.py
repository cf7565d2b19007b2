"""The report page: self-contained, escaped, honest about numbers, readable on a phone."""

import math
import re
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE
from PIL import Image

from blip_fast.media.images import ImageError
from blip_fast.report import Bars, Card, Line, Metric, Plot, Report
from blip_fast.report.plot import MAX_POINTS, _spread, _thin, _ticks

EVIL = '<script>alert("x")</script> & \' </style>'
def picture(width=40, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def full_report(text="a small red circle on grey"):
    report = Report(text, text, {text: text})
    report.section(text, text).metrics([Metric(text, 0.635, 0.6, 0.005),
                                        Metric(text, 1.2, 1.5, 2.6, text, True)])
    report.section("Losses").plots([Plot(text, {text: [(0, 3.0), (5, 1.0)]}, text, text, {text: 2.0})])
    report.section("Rows").table([text, "n"], [[text, 3], ["b", 0.25]], text)
    return report.section("Pictures").cards([Card(picture(),
                                                  [Line(text, text, text, True), Line(text, struck=True)]),
                                             Card(picture(900, 300), [Line(text, right=False)])])


def test_the_page_needs_nothing_from_outside(tmp_path):
    path = full_report().write(tmp_path / "new" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"(?i)https?:|url\(|@import|<link|<script", html)
    page = Page(html)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)
    assert "prefers-color-scheme: dark" in html and ("name", "viewport") in page.attributes


def test_every_text_is_escaped():
    page, plain = Page(full_report(EVIL).html()), Page(full_report("plain").html())
    assert page.tags == plain.tags
    assert page.text.count(EVIL) == plain.text.count("plain") == 23


def test_metrics_show_value_target_chance_and_whether_it_is_met():
    html = Report("t").section("s").metrics([
        Metric("recall", 0.635, target=0.6, chance=0.005), Metric("missed", 0.5, target=0.6),
        Metric("free", 0.5),
        Metric("loss", 1.2, 1.5, 2.6, "nats", lower_is_better=True), Metric("broken", math.nan, target=0.6),
    ]).html()
    rows = re.findall(r"<tr><td>.*?</tr>", html)
    assert all(text in rows[0] for text in ("63.5 %", "60.0 %", "0.5 %", "✓", "width:63.5%", "left:60.0%",
                                            "left:0.5%"))
    assert "✗" in rows[1] and "✓" not in rows[1]
    assert not any(sign in rows[2] for sign in "✓✗")
    assert "✓" in rows[3] and "1.2<" in rows[3] and "nats" in rows[3] and "%</td>" not in rows[3]
    assert "✗" in rows[4] and "not finite" in rows[4] and "nan" not in rows[4]


def test_without_chance_levels_there_is_no_column_of_them():
    html = Report("t").section("s").metrics([Metric("ratio", 2.0, 3.0, unit="×")]).html()
    assert "Target</th>" in html and "Chance" not in html


def test_pictures_small_ones_untouched_large_ones_reduced():
    html = full_report().html()
    kinds = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html)
    assert [kind for kind, _ in kinds] == ["png", "jpeg"]
    assert len(kinds[1][1]) < 60_000
    with pytest.raises(ImageError, match="no such file"):
        Report("t").section("s").cards([Card("missing.png", [])])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_ticks_are_few_evenly_spaced_and_enclose_the_values(values):
    low, high = _spread(values)
    ticks = _ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in pairwise(ticks))


def test_ticks_are_round_numbers():
    assert _ticks(0.3, 9.1) == [0, 2.5, 5, 7.5, 10]
    assert _ticks(0, 3e-4) == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    assert _ticks(990, 1010) == [990, 995, 1000, 1005, 1010]


def test_curves_lie_where_the_axis_says():
    html = Plot("p", {"a": [(0, 0.0), (10, 10.0)]}).html()
    corners = [float(c) for c in re.findall(r'points="([^"]*)"', html)[0].replace(",", " ").split()]
    grid = [float(y) for y in re.findall(r'class="grid"[^>]*y1="([\d.]+)"', html)]
    assert corners[1] == max(grid) and corners[3] == min(grid)  # 0 on the lowest line, 10 on the highest
    assert corners[0] < corners[2]


def test_bars_are_as_long_as_their_values_and_coloured_by_name():
    page = Bars(EVIL, {EVIL: {"ours": 4.0, "peer": 1.0}, "second": {"peer": 2.0, "broken": math.nan}},
                EVIL).html()
    found = re.findall(r'<rect [^>]*width="([\d.]+)".*?(--series-\d)', page)
    bars = [(float(width), colour) for width, colour in found]
    assert [width / bars[0][0] for width, _ in bars] == pytest.approx([1.0, 0.25, 0.5], abs=1e-3)
    assert [colour for _, colour in bars] == ["--series-0", "--series-1", "--series-1"]
    assert Page(page).text.count(EVIL) == 3
    with pytest.raises(ValueError, match="0 names"):
        Bars("none", {})


def test_long_series_keep_their_mean_and_are_thinned():
    points = [(x, float(x % 7)) for x in range(10_007)]
    thin = _thin(points)
    assert len(thin) == MAX_POINTS
    assert (sum(y for _, y in thin) / len(thin)
            == pytest.approx(sum(y for _, y in points) / len(points), abs=0.01))
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(0, 1.0)], [(0, 1.0), (1, 1.0)],
                                    [(0, 2.0), (1, math.inf)]])
def test_a_run_that_diverged_still_has_a_plot(points):
    html = Plot("p", {"loss": points}, levels={"chance": math.nan}).html()
    assert "<svg" in html and not re.search(r'="[^"]*(nan|inf)', html)
    assert ("not finite" in html) == (not points or not math.isfinite(points[-1][1]))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="open a section first"):
        Report("t").table(["a"], [["x"]])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Report("t").section("s").table(["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="has 7 lines"):
        Plot("p", {str(i): [] for i in range(7)})


@pytest.mark.skipif(shutil.which("chromium") is None,
                    reason="chromium is not installed: no browser to measure in")
def test_a_phone_needs_no_sideways_scrolling(tmp_path):
    report = full_report("supercalifragilisticexpialidocious" * 2)
    report.section("wide").table([f"column {i}" for i in range(12)], [list(range(12))])
    report.write(tmp_path / "report.html")
    (tmp_path / "frame.html").write_text(
        '<iframe id="f" src="report.html" style="width:380px;border:0"></iframe><script>onload = () => '
        'document.title = "width " + f.contentDocument.documentElement.scrollWidth</script>')
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile",
               "--dump-dom", f"file://{tmp_path}/frame.html"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert "<title>width 380</title>" in seen
