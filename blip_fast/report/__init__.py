"""A self-contained HTML page about a run: metrics, loss curves, pictures with captions."""

from blip_fast.report.page import Card, Line, Metric, Report
from blip_fast.report.plot import Bars, Plot

__all__ = ["Bars", "Card", "Line", "Metric", "Plot", "Report"]
