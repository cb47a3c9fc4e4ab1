"""Plots of a root as SVG that a page can hold: text stays text, no script, nothing fetched.

Each is drawn for the width of a phone, so that its letters are read there as they are; a wider page sets
several side by side.
"""

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["bars", "timeline"]

WIDTH_IN, HEIGHT_IN = 3.8, 2.4
"""At 72 points an inch 274 points wide, about what a phone shows: letters keep their size."""
COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a")
INK = "#5b6577"
POINTS = 48
"""Single hours are marked as long as there are fewer."""
HOUR = 1 / 24
"""matplotlib counts time in days."""


def timeline(
    starts_s: Sequence[int], series: Sequence[tuple[str, Sequence[float | None]]], *, unit: str
) -> str:
    """Draw values by the hour.

    Args:
        starts_s: The hours' beginnings, in seconds since the epoch, ascending.
        series: Names and values, one for each hour; None where there is none.
        unit: What the values are: ``"%"``, ``"bytes"`` or a word.
    """
    figure, axes = _axes(unit)
    times = date2num([datetime.fromtimestamp(start, UTC) for start in starts_s])
    marker = "." if len(starts_s) < POINTS else ""
    for (name, values), colour in zip(series, COLOURS, strict=False):
        heights = [math.nan if value is None else value for value in values]
        axes.plot(times, heights, label=name, color=colour, linewidth=1.4, marker=marker)
    # An hour at either end: one single hour has no width of its own.
    axes.set_xlim(times[0] - HOUR, times[-1] + HOUR)
    locator = AutoDateLocator(minticks=2, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_ylim(bottom=0, top=103 if unit == "%" else None)
    if len(series) > 1:
        figure.legend(frameon=False, fontsize=9, ncols=len(series), loc="outside upper left")
    return _svg(figure)


def bars(names: Sequence[str], values: Sequence[float], *, unit: str) -> str:
    """Draw one bar for each name, from left to right."""
    figure, axes = _axes(unit)
    axes.bar(range(len(names)), values, color=COLOURS[0], width=0.7)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylim(bottom=0)
    return _svg(figure)


def _axes(unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c9d4")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if unit == "bytes":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    elif unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    else:
        axes.set_ylabel(unit, color=INK, fontsize=9)
    return figure, axes


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:  # noqa: PLR2004 - the next unit's
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    # Text as text, found by a search and read by a screen reader; ids that do not change between runs.
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "prefixstore", "font.family": "sans-serif"}
    ):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
