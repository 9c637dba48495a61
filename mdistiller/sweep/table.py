"""Results of a sweep: a Markdown table and a CSV file, a row a cell (or a searched point)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mdistiller.files.tables import csv_table, markdown_table
from mdistiller.sweep.fields import ACCURACIES, METRICS

if TYPE_CHECKING:
    from mdistiller.sweep.plan import Plan
    from mdistiller.sweep.trial_state import Status

LABELS = dict(
    zip(
        METRICS,
        (
            *("last top-1 %", "best top-1 %", "last, on the test set", "best, on the test set"),
            *("last balanced %", "best balanced %", "last macro F1 %", "best macro F1 %"),
            *("last k-NN %", "best k-NN %"),
        ),
        strict=True,
    )
)


@dataclass
class Row:
    """A cell of a grid over its seeds, or a searched point.

    Attributes:
        runs: results of finished runs.
        failed: errors of failed trials, by their name.
        unfinished: trials that are open, running or pruned, by state.
    """

    name: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """A metric of all runs that have it."""
        return [run[metric] for run in self.runs if run.get(metric) is not None]

    def ends(self, number: str) -> tuple[float | None, float | None]:
        """Means over the runs of a number of the first and of the last epoch; None without it."""
        runs = [run for run in self.runs if number in run["first"]]
        first, last = ([run[end][number] for run in runs] for end in ("first", "last"))
        return (statistics.mean(first), statistics.mean(last)) if runs else (None, None)

    def selected_on(self) -> str:
        """What the best epochs were selected on."""
        return ", ".join(sorted({run["selected_on"] for run in self.runs}))

    def loss_fell(self) -> bool:
        """Whether every run's training loss was lower in its last epoch than in its first."""
        return all(run["last"]["train_loss"] < run["first"]["train_loss"] for run in self.runs)


def rows(plan: Plan, status: Mapping[str, Status]) -> list[Row]:
    """The table's rows: a grid's in the order of the file, a search's with the best first."""
    found: dict[str, Row] = {}
    for trial in plan.trials:
        now = status[trial.name]
        params = ",".join(f"{key}={short(value)}" for key, value in now.params.items())
        row = found.setdefault(trial.cell, Row(f"{trial.cell}: {params}" if params else trial.cell))
        row.runs += now.results
        if now.state == "failed":
            row.failed[trial.name] = now.error
        elif now.state != "done":
            row.unfinished[now.state] = row.unfinished.get(now.state, 0) + 1
    if not plan.space:
        return list(found.values())

    def rank(row: Row) -> float:
        values = row.values(plan.metric)
        return -statistics.mean(values) if values else float("inf")

    return sorted(found.values(), key=rank)


def short(value: Any) -> str:
    """A number to four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean_std(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, to two places; the mean alone of a single value."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def all_well(plan: Plan, table: Sequence[Row]) -> bool:
    """Whether no trial failed and, where that is asked for, every loss fell."""
    return not any(row.failed or (plan.loss_falls and not row.loss_fell()) for row in table)


def metrics(plan: Plan, table: Sequence[Row]) -> list[str]:
    """The plan's metric, and the accuracies that any run has."""
    others = [m for m in ACCURACIES if m != plan.metric and any(row.values(m) for row in table)]
    return [plan.metric, *others]


def markdown(plan: Plan, table: Sequence[Row]) -> str:
    """The table, and below it what went wrong or is missing."""
    columns = metrics(plan, table)
    head = ["trial" if plan.space else "cell", *(LABELS[m] for m in columns), "best selected on"]
    head += ["loss, first → last epoch", "training top-1 %", "loss fell"] if plan.loss_falls else []
    head += ["runs", "failed"]
    lines = []
    for row in table:
        means = (mean_std(row.values(m)) for m in columns)
        losses = _loss_cells(row) if plan.loss_falls else []
        end = (len(row.runs), len(row.failed))
        lines.append([row.name, *means, row.selected_on() or "-", *losses, *end])
    text = [markdown_table(head, lines)]
    several = any(len(row.runs) > 1 for row in table)
    text += ["", "Mean ± sample standard deviation over the runs of a row."] if several else []
    failures = [f"- {name} failed: {error}" for row in table for name, error in row.failed.items()]
    text += ["", *failures] if failures else []
    missing = {state: sum(r.unfinished.get(state, 0) for r in table) for state in _STATES}
    counts = [f"{count} {state}" for state, count in missing.items() if count]
    text += ["", f"Not finished: {', '.join(counts)}."] if counts else []
    return "\n".join(text)


_STATES = ("running", "open", "pruned")


def _loss_cells(row: Row) -> list[str]:
    fell = ("yes" if row.loss_fell() else "NO") if row.runs else "-"
    cells = []
    for number, digits in (("train_loss", ".4g"), ("train_acc", ".1f")):
        first, last = row.ends(number)
        missing = first is None or last is None
        cells.append("-" if missing else f"{first:{digits}} → {last:{digits}}")
    return [*cells, fell]


def csv_text(plan: Plan, table: Sequence[Row]) -> str:
    """The same numbers, unrounded; empty where a number is missing."""
    rows = []
    for row in table:
        cells: dict[str, Any] = {"name": row.name}
        for metric in metrics(plan, table):
            values = row.values(metric)
            cells[f"{metric}_mean"] = statistics.mean(values) if values else None
            cells[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        for number in ("train_loss", "train_acc"):
            ends = row.ends(number)
            cells |= {f"{number}_first": ends[0], f"{number}_last": ends[1]}
        counts = {"runs": len(row.runs), "failed": len(row.failed)}
        rows.append({**cells, "selected_on": row.selected_on(), **counts})
    return csv_table(rows)
