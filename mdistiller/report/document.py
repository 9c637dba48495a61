"""A report's parts, apart from how they are shown; Markdown of them."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

from mdistiller.files.tables import markdown_table


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
class Section:
    """A heading with notes, tables and charts."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)


@dataclass
class Report:
    """A whole report; `numbers` are the unrounded ones, a row a group."""

    title: str
    lead: list[str]
    sections: list[Section]
    numbers: list[dict[str, Any]]


def markdown(report: Report) -> str:
    """The report without its charts. Texts from configs cannot become markup."""
    parts = [f"# {_safe(report.title)}", *map(_safe, report.lead)]
    for section in report.sections:
        if not (section.notes or section.tables):
            continue
        parts.append(f"## {_safe(section.title)}")
        for table in section.tables:
            parts += [f"**{_safe(table.caption)}**"] if table.caption else []
            rows = [map(_safe, row) for row in table.rows]
            parts += [markdown_table(map(_safe, table.head), rows)] if rows else []
        parts += map(_safe, section.notes)
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    """A text as one line of Markdown that shows it as it is."""
    escaped = html.escape(" ".join(str(text).split()), quote=False).replace("\\", "\\\\")
    for sign in "`*[":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped
