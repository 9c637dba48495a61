"""Tables in Markdown, aligned so that a terminal shows them well too."""

from __future__ import annotations

from collections.abc import Iterable

from tabulate import tabulate


def markdown_table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of the cells as they are, empty without rows.

    Bars in a cell are escaped, line breaks become spaces.
    """
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)
    ]
    return tabulate(cells[1:], cells[0], "github", disable_numparse=True) if cells[1:] else ""
