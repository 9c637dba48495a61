"""The HTML page of a report: one file, charts inline, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mdistiller.report.document import Chart, Line, Means, Report, Table

# Of the drawing, in its own units; shown at up to 1.4 times that, so that texts stay readable.
WIDTH, HEIGHT = 360.0, 232.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 22.0, 36.0


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` (values), drawn from `start` to `end` (units)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Drawn:
    """A curve as SVG paths; `band` is empty where all runs agree; `dot` is its end."""

    line: Line
    path: str
    band: str
    dot: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """A chart with its axes and curves in place."""

    chart: Chart
    x: Axis
    y: Axis
    curves: list[Drawn]


@dataclass(frozen=True)
class Whisker:
    """A mean in a chart of means: where dot and interval are, in percent of the width."""

    name: str
    text: str
    style: int
    dot: float
    low: float
    high: float


@dataclass(frozen=True)
class Strip:
    """A chart of means in place; `reference` and `ticks` are in percent of the width, which is 112
    pixels on a telephone: there every second one of more than three ticks has no number."""

    rows: list[Whisker]
    reference: float | None
    ticks: list[tuple[float, float]]


def page(report: Report) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tick": tick, "breakable": breakable}
    template = environment.get_template("page.html")
    return template.render(
        report=report, draw=draw, place=place, shade=shade, width=WIDTH, height=HEIGHT
    )


def draw(chart: Chart) -> Drawing:
    """Put a chart's curves into its frame."""
    last = chart.start - 1 + max(len(line.mean) for line in chart.lines)
    values = [value for line in chart.lines for value in (*line.low, *line.high)]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    last = max(last, chart.start + 1)
    x = Axis(chart.start, last, LEFT, WIDTH - RIGHT, whole_ticks(chart.start, last))
    ticks = nice_ticks(min(finite), max(finite))
    y = Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, tuple(ticks))
    return Drawing(chart, x, y, [_curve(line, x, y) for line in chart.lines])


def place(means: Means) -> Strip:
    """Put a chart's means on one axis."""
    ends = [(p.mean - (p.half or 0.0), p.mean + (p.half or 0.0)) for p in means.points]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if means.reference is not None:
        low, high = min(low, means.reference), max(high, means.reference)
    ticks = nice_ticks(low, high, 4)
    axis = Axis(ticks[0], ticks[-1], 10.0, 90.0, tuple(ticks))
    rows = [
        Whisker(p.name, p.text, p.style, *(round(axis.place(v), 2) for v in (p.mean, *its)))
        for p, its in zip(means.points, ends, strict=True)
    ]
    reference = None if means.reference is None else round(axis.place(means.reference), 2)
    return Strip(rows, reference, [(value, round(axis.place(value), 2)) for value in ticks])


def _curve(line: Line, x: Axis, y: Axis) -> Drawn:
    band = ""
    if line.low != line.high:
        there = _points(line.low, x, y)
        back = _points(line.high, x, y)[::-1]
        band = f"M{'L'.join(there + back)}Z"
    last = x.low + len(line.mean) - 1
    dot = (x.place(last), y.place(line.mean[-1]) if math.isfinite(line.mean[-1]) else y.start)
    points = _points(line.mean, x, y)
    return Drawn(line, f"M{'L'.join(points)}" if points else "", band, dot)


def _points(values: Sequence[float], x: Axis, y: Axis) -> list[str]:
    return [
        f"{x.place(x.low + number):.1f} {y.place(value):.1f}"
        for number, value in enumerate(values)
        if math.isfinite(value)
    ]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances that enclose `low` and `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    steps = (power * factor for factor in (1, 2, 2.5, 5, 10, 20))
    for step in steps:
        first, last = math.floor(low / step), math.ceil(high / step)
        last = max(last, first + 1)
        if last - first <= most:
            break
    return [number * step for number in range(first, last + 1)]


def whole_ticks(first: int, last: int) -> tuple[float, ...]:
    """Epochs to label: the first, the last, and round ones that keep a distance to both."""
    ticks = nice_ticks(first, last)
    step = max(1, round(ticks[1] - ticks[0]))
    inner = range(first // step * step + step, last, step)
    return (first, *(e for e in inner if e - first >= step / 2 and last - e >= step / 2), last)


def tick(value: float) -> str:
    """A number at an axis."""
    return f"{value:.4g}"


def breakable(text: str) -> Markup:
    """A name that may be broken behind its commas and colons."""
    safe = escape(text)
    return Markup(str(safe).replace(",", ",<wbr>").replace(":", ":<wbr>"))


def shade(table: Table, row: int, column: int) -> int | None:
    """Of a shaded table's cell, its share of the way from the lowest to the highest, 0 to 4."""
    if table.heat is None or table.heat[row][column] is None:
        return None
    values = [value for line in table.heat for value in line if value is not None]
    low, high = min(values), max(values)
    value = table.heat[row][column] or 0.0
    return 2 if high == low else min(4, int((value - low) / (high - low) * 5))
