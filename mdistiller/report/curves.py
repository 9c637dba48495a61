"""The curves of a report, and how fast they rise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mdistiller.config.tasks import TASKS
from mdistiller.report.document import Chart, Line, Section, Table
from mdistiller.report.groups import Group, comparable_groups
from mdistiller.report.numbers import estimate
from mdistiller.report.runs import Run
from mdistiller.report.tables import NONE, plus_minus

MOST = 10
"""Curves in a chart: more cannot be told apart."""
FEW = 5
"""Epochs that are too few for a chart of their own."""
SHARE = 0.95
_LEARNING = (
    ("test_acc", "Accuracy on {images}", "top-1 %"),
    ("train_acc", "Accuracy in training", "top-1 %"),
    ("test_loss", "Cross-entropy on {images}", "nats"),
    ("test_knn", "k-NN accuracy of the features on labelled images", "top-1 %"),
)


def learning(groups: Sequence[Group], base: Group | None = None) -> Section:
    """Accuracy and loss by epoch, of the groups that compare with the baseline if there is one."""
    drawn, notes = _drawn(groups, base)
    curves = (*_LEARNING, *(curve for task in TASKS.values() for curve in task.curves))
    images = _images(drawn)
    labelled = any(g.curve("test_acc") for g in drawn)  # else test_loss is the method's own
    charts = [
        _chart(drawn, key, title.format(images=images), unit)
        for key, title, unit in curves
        if labelled or key != "test_loss"
    ]
    longest = max((len(line.mean) for line in charts[0].lines), default=0)
    if longest >= 2 * FEW:
        title = f"Accuracy on {images}, second half"
        half = _chart(drawn, "test_acc", title, "top-1 %", longest // 2)
        charts.insert(1, half)
    return _section("Learning curves", drawn, charts, notes)


def _images(groups: Sequence[Group]) -> str:
    """What epochs are evaluated on."""
    splits = {bool(g.config.get("DATASET.VAL_SPLIT")) for g in groups}
    if len(splits) > 1:
        return "the test set or held-out images"
    return "held-out images" if True in splits else "the test set"


def loss_terms(groups: Sequence[Group], base: Group | None = None) -> Section:
    """The training loss by epoch, its terms apart: a chart for each group of the same groups.

    Without labels also the loss on held-out or test images, which selects the best epoch.
    """
    drawn, notes = _drawn(groups, base)
    charts = [Chart(g.name, "loss", _terms(g, _images(drawn))) for g in drawn[:MOST]]
    section = _section("Training loss", drawn, charts, notes)
    if len(section.charts) > 1:
        section.notes.insert(0, "Each group has its own axis: methods' losses do not compare.")
    return section


def _terms(g: Group, images: str) -> list[Line]:
    rows = (row for run in g.runs for row in run.epochs)
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if "train_loss_" in key]
    if len(keys) != 1:
        keys.insert(0, "train_loss")
    if not g.curve("test_acc"):
        keys.append("test_loss")
    names = {"train_loss": "all terms", "test_loss": f"all terms, on {images}"}
    lines = [(key, _line(g, key, style)) for style, key in enumerate(keys)]
    for key, line in lines:
        if line is not None:
            line.name = names.get(key, key.removeprefix("train_"))
    return [line for _, line in lines if line is not None]


def _drawn(groups: Sequence[Group], base: Group | None) -> tuple[list[Group], list[str]]:
    """Groups that fit into one chart, and what to say of the others, a teacher's longer run say."""
    drawn = comparable_groups(groups, base)
    left = ", ".join(g.name for g in groups if g not in drawn)
    notes = [f"Not drawn, as they do not compare with {base.name}: {left}."] if base else []
    return drawn, notes if left else []


def _section(
    title: str, groups: Sequence[Group], charts: list[Chart], notes: Sequence[str]
) -> Section:
    section = Section(title, charts=[chart for chart in charts if chart.lines])
    if section.charts:
        section.notes.append("Lines are means over seeds, bands go from the lowest to the highest.")
        if len(groups) > MOST:
            section.notes.append(
                f"Of {len(groups)} groups the first {MOST} of the table are drawn."
            )
        section.notes += notes
    return section


def _chart(groups: Sequence[Group], key: str, title: str, unit: str, start: int = 1) -> Chart:
    lines = [_line(g, key, style, start) for style, g in enumerate(groups[:MOST])]
    return Chart(title, unit, [line for line in lines if line is not None], start)


def _line(g: Group, key: str, style: int, start: int = 1) -> Line | None:
    """A group's curve; None if it has none."""
    epochs = g.curve(key)[start - 1 :]
    if not epochs:
        return None
    name = g.name if g.finished else f"{g.name} (unfinished)"
    ends = [min(epoch) for epoch in epochs], [max(epoch) for epoch in epochs]
    return Line(name, [fmean(epoch) for epoch in epochs], *ends, style)


def goal(groups: Sequence[Group], base: Group | None, reach: float | None) -> float | None:
    """The accuracy to reach: as given, else 95 % of where the baseline or the best group ends."""
    if reach is not None:
        return reach
    ends = []
    for g in [base] if base else groups:
        values = g.by_seed(
            lambda run: run.summary.get("last_acc", run.summary.get("last_knn"))
        ).values()
        ends += [fmean(values)] if values else []
    return SHARE * max(ends) if ends else None


def reached(run: Run, accuracy: float) -> tuple[int, float] | None:
    """Epochs and seconds until a run's accuracy is there, earlier stages' seconds included."""
    scores = ["test_acc", *(task.score for task in TASKS.values()), "test_knn"]
    seconds = sum(row.get("seconds", 0.0) for row in run.stages)
    for row in run.epochs:
        seconds += row.get("seconds", 0.0)
        if next((row[key] for key in scores if key in row), 0.0) >= accuracy:
            return int(row["epoch"]), seconds
    return None


def convergence(groups: Sequence[Group], base: Group | None, reach: float | None) -> Section:
    """Epochs and seconds until an accuracy is reached."""
    wanted = goal(groups, base, reach)
    if wanted is None:
        return Section("Convergence")
    rows = []
    for g in groups:
        hits = [hit for run in g.finished if (hit := reached(run, wanted))]
        if g.finished:
            epochs, seconds = ([float(hit[i]) for hit in hits] for i in (0, 1))
            row = [g.name, f"{len(hits)} of {len(g.finished)}", plus_minus(estimate(epochs))]
            rows.append([*row, f"{fmean(seconds):.1f}" if seconds else NONE])
    if not rows:
        return Section("Convergence")
    whose = base.name if base else "the best group"
    why = "" if reach is not None else f", {SHARE:.0%} of what {whose} ends at"
    head = ["group", "runs that reach it", f"epochs to {wanted:.2f} %", "seconds"]
    notes = [f"The goal is {wanted:.2f} % on the images that epochs are evaluated on{why}. "]
    notes[0] += "Means are over the runs that reach it."
    return Section("Convergence", notes, [Table(head, rows)])
