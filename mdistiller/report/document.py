"""A report's parts, apart from how they are shown; Markdown of them."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

from mdistiller.files.tables import markdown_table

_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]\d+)?( ± [\d.]+)?$")


@dataclass
class Table:
    """Cells as texts; the first column names the row.

    Attributes:
        caption: what it shows, if the section's title does not.
        heat: numbers to shade the cells by, of the shape of the rows; None: not shaded.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    heat: list[list[float | None]] | None = None

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether its cells are numbers, to be aligned on the right."""
        return [
            number > 0 and all(_NUMBER.match(cell) or cell == "-" for cell in column)
            for number, column in enumerate(zip(*self.rows, strict=True))
        ]


@dataclass
class Line:
    """A curve: by epoch, the mean over seeds, and the lowest and the highest run.

    Attributes:
        style: number of its colour and dash, the same for a group in all charts.
    """

    name: str
    mean: list[float]
    low: list[float]
    high: list[float]
    style: int = 0


@dataclass
class Chart:
    """Curves over epochs, or what `across` says; `start` is where their first values are."""

    title: str
    unit: str
    lines: list[Line]
    start: int = 1
    across: str = "epoch"


@dataclass
class Mean:
    """A group's mean over seeds and half its interval, None for one seed; `style` as of a Line."""

    name: str
    mean: float
    half: float | None
    text: str
    style: int = 0


@dataclass
class Means:
    """Means of groups side by side; `reference` is the baseline's."""

    title: str
    points: list[Mean]
    reference: float | None = None


@dataclass
class Section:
    """A heading with notes, tables and charts."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    means: list[Means] = field(default_factory=list)


@dataclass
class Report:
    """A whole report; `numbers` are the unrounded ones, a row a group; `unit` is accuracy's."""

    title: str
    lead: list[str]
    sections: list[Section]
    numbers: list[dict[str, Any]]
    unit: str = "top-1"


def markdown(report: Report) -> str:
    """The report without its charts. Texts from configs cannot become markup."""
    parts = [f"# {_safe(report.title)}", *map(_safe, report.lead)]
    for section in report.sections:
        if not section.tables and (section.charts or section.means or not section.notes):
            continue
        parts.append(f"## {_safe(section.title)}")
        for table in section.tables:
            parts += [f"**{_safe(table.caption)}**"] if table.caption else []
            rows = [map(_safe, row) for row in table.rows]
            parts += [markdown_table(map(_safe, table.head), rows, table.numeric)] if rows else []
        parts += map(_safe, section.notes)
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    """A text as one line of Markdown that shows it as it is."""
    escaped = html.escape(" ".join(str(text).split()), quote=False).replace("\\", "\\\\")
    for sign in "`*[":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped
