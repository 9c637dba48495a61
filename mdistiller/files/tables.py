"""Tables as Markdown, aligned for terminals, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate


def markdown_table(
    head: Iterable[object], rows: Iterable[Iterable[object]], right: Sequence[bool] = ()
) -> str:
    """A Markdown table with the cells as they are; "" without rows.

    Bars in a cell are escaped, line breaks become spaces.

    Args:
        right: of each column, whether it is aligned on the right; by default none is.
    """
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)
    ]
    if not cells[1:]:
        return ""
    sides = ["right" if one else "left" for one in right] or None
    return tabulate(cells[1:], cells[0], "github", disable_numparse=True, colalign=sides)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with the columns of all rows, unrounded; missing values and None are empty.

    Text that a spreadsheet would read as a formula gets a quotation mark in front.
    """
    out = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _no_formula(value) for key, value in row.items()})
    return out.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
