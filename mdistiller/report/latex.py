"""The report's main table for a paper, in LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mdistiller.report.numbers import Difference, Estimate
from mdistiller.report.tables import plus_minus

_SPECIAL = re.compile(r"[&%$#_{}]")


def latex(numbers: Sequence[Mapping[str, Any]], which: str, unit: str) -> str:
    r"""A `tabular` with a row a group: seeds, accuracy, difference to the baseline, p-value.

    Needs \usepackage{booktabs}. The highest mean of the students of each baseline is bold.

    Args:
        numbers: rows of a report, see `Report.numbers`.
        which: epoch of the accuracies, "last" or "best".
        unit: what they are.
    """
    parts = [
        [row for row in numbers if row["role"] == "teacher"],
        *(
            [row for row in numbers if row["role"] != "teacher" and row["baseline"] == name]
            for name in dict.fromkeys(row["baseline"] for row in numbers)
        ),
    ]
    lines = [_lines(part, which) for part in parts if part]
    body = "\n\\midrule\n".join("\n".join(part) for part in lines)
    return (
        f"% {unit} on the test set, {which} epoch: mean and half the 95 % confidence interval over "
        "seeds;\n% difference to the baseline with the same seed, p of the paired t-test by Holm's "
        "adjustment\n"
        "\\begin{tabular}{lrrrr}\n\\toprule\n"
        f"Method & Seeds & {_escape(unit)} (\\%) & Difference & $p$ \\\\\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _lines(rows: Sequence[Mapping[str, Any]], which: str) -> list[str]:
    means = [row[f"{which}_mean"] for row in rows if row[f"{which}_mean"] is not None]
    lines = []
    for row in rows:
        mean, seeds = row[f"{which}_mean"], row[f"{which}_seeds"]
        value = None if mean is None else Estimate(mean, row[f"{which}_ci95"], seeds)
        gap = row[f"{which}_difference"]
        change = None if gap is None else Difference(gap, row["difference_ci95"], row["pairs"])
        cells = [_math(plus_minus(value)), _math(plus_minus(change, "+"))]
        if len(means) > 1 and mean == max(means) and row["role"] != "teacher":
            cells[0] = f"$\\mathbf{{{cells[0].strip('$')}}}$"
        p = row["p_holm"]
        cells.append("--" if p is None else "$<0.001$" if p < 0.001 else f"${p:.3f}$")
        lines.append(f"{_escape(row['group'])} & {seeds} & {' & '.join(cells)} \\\\")
    return lines


def _math(text: str) -> str:
    return "--" if text == "-" else f"${text.replace('±', chr(92) + 'pm')}$"


def _escape(text: str) -> str:
    text = text.replace("\\", "/").replace("~", " ").replace("^", " ")
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", text)
