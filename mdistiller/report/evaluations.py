"""Results of `eval` and `eval_detection`, read from their JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mdistiller.registry import UserError
from mdistiller.report.curves import MOST
from mdistiller.report.document import Chart, Line, Section, Table
from mdistiller.report.groups import Group
from mdistiller.report.numbers import estimate
from mdistiller.report.runs import Run
from mdistiller.report.tables import plus_minus

_EPOCHS = {"latest": "last", "best": "best"}
_SAME = 0.3  # points: another device rounds some images to the other side
COLUMNS = {
    "balanced_accuracy": "balanced %",
    "macro_f1": "macro F1 %",
    "nll": "loss = NLL",
    "ece": "ECE %",
    "teacher.agreement": "agrees with the teacher %",
    "teacher.kl": "KL(teacher, student)",
    "teacher.only_teacher": "only the teacher right %",
    "teacher.only_student": "only the student right %",
}
"""Numbers of an evaluation, and what a table calls them."""


def attach_evaluations(runs: Sequence[Run], file: Path) -> None:
    """Add the results in a JSON file of `eval` or `eval_detection` to the runs of their students.

    Raises:
        UserError: the file is of another kind, has results for other runs alone, or another
            accuracy than the run recorded, hence of other data or other weights.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        taught = contents.get("own_teacher_of") or []
        teacher = "-" if "annotations" in contents else str(contents["teacher"] or "-")
        networks = [(Path(one["weights"]), *_measured(one)) for one in contents["networks"]]
    except OSError as error:
        raise UserError(f"--evaluation {file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        text = f"--evaluation {file} is not a JSON file of eval or eval_detection (--json)"
        raise UserError(text) from None
    own_teacher = {Path(folder).resolve() for folder in taught}
    by_folder = {run.folder.resolve(): run for run in runs}
    taken = 0
    for weights, top1, one in networks:
        run = by_folder.get(weights.parent.resolve())
        epoch = _EPOCHS.get(weights.name.removeprefix("student_"))
        if run is not None and epoch is not None:
            accuracy = run.number(epoch)
            if accuracy is not None and abs(accuracy - top1) > _SAME:
                raise UserError(
                    f"--evaluation {file} has {top1:.2f} % for {weights}, the run recorded "
                    f"{accuracy:.2f} %: the data differ, or the run was repeated; run eval again"
                )
            if weights.parent.resolve() in own_teacher:
                _check_teacher(run, one, file)
            teacher_facts = one.get("teacher") or {}
            one["compared_with"] = teacher_facts.get("label", teacher)
            run.evaluations.setdefault(epoch, one)  # a teacher's accuracy comes last
            taken += 1
    if not taken:
        raise UserError(
            f"--evaluation {file} has results for other runs only: "
            f"{', '.join(str(weights) for weights, *_ in networks[:3]) or 'no network'}"
        )


def _check_teacher(run: Run, one: dict[str, Any], file: Path) -> None:
    """Refuse an evaluation with another teacher than the run's, by its accuracy."""
    recorded, top1 = run.summary.get("teacher_acc"), float(one["top1"])
    top1 += float((one.get("teacher") or {}).get("gap", 0.0))
    if isinstance(recorded, float) and abs(recorded - top1) > _SAME:
        raise UserError(
            f"--evaluation {file} has {top1:.2f} % for the teacher of {run.folder}, the run "
            f"recorded {recorded:.2f} %: one of the two changed since; run eval again"
        )


def _measured(one: Any) -> tuple[float, dict[str, Any]]:
    """A network's accuracy or box AP in %, and the results to keep."""
    if "curves" not in one:
        return float(one["top1"]), one
    boxes = one["curves"]["bbox"]
    curves = {"mean over classes": boxes} | {f"class {k}": v for k, v in boxes["classes"].items()}
    points = {k: [100.0 * float(v) for v in one["precision50"]] for k, one in curves.items()}
    return float(one["numbers"]["bbox/AP"]), {"precision": points}


def evaluated(run: Run, which: str, name: str) -> float | None:
    """A number of the evaluation of a run's last or best epoch, by its dotted name."""
    value: Any = run.evaluations.get(which)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def predictions(groups: Sequence[Group], which: str) -> Section:
    """Calibration, agreement with the teachers, and precision by recall."""
    rows: list[tuple[str, dict[str, Any], str]] = []
    used: set[str] = set()
    for g in groups:
        cells = {}
        for name in COLUMNS:
            values = g.by_seed(lambda run, name=name: evaluated(run, which, name))  # type: ignore[misc]
            if values:
                cells[name] = estimate(list(values.values()))
        if cells:
            used |= cells.keys()
            labels = (run.evaluations.get(which, {}).get("compared_with") for run in g.finished)
            teacher = ", ".join(dict.fromkeys(name for name in labels if name))
            rows.append((g.name, cells, teacher))
    section = Section("Precision and recall", charts=_precision(groups, which))
    if section.charts:
        section.notes = [
            f"Boxes that overlap the truth by half or more, {which} epoch, from "
            "tools/eval_detection.py; the area below a curve of a class is its AP50."
        ]
    if not rows:
        return section
    columns = [name for name in COLUMNS if name in used]
    shown = [
        [
            name,
            *(
                plus_minus(cells.get(c), most=4 if c.endswith(("nll", "kl")) else 2)
                for c in columns
            ),
            teacher,
        ]
        for name, cells, teacher in rows
    ]
    note = f"On the test set, {which} epoch, from tools/eval.py: docs/evaluation.md explains them."
    section.title = "Answers"
    section.notes.insert(0, note)
    section.tables = [Table(["group", *map(COLUMNS.__getitem__, columns), "teacher"], shown)]
    return section


def _precision(groups: Sequence[Group], which: str) -> list[Chart]:
    """Precision by recall, a chart of all classes and one of each of the first ten."""
    drawn: dict[str, list[Line]] = {}
    having = [g for g in groups if any("precision" in r.evaluations.get(which, {}) for r in g.runs)]
    for style, g in enumerate(having[:MOST]):
        by_class: dict[str, list[list[float]]] = {}
        for run in g.finished:
            for name, curve in run.evaluations.get(which, {}).get("precision", {}).items():
                by_class.setdefault(name, []).append(curve)
        for name, curves in by_class.items():
            points = list(zip(*curves, strict=False))
            ends = [min(point) for point in points], [max(point) for point in points]
            line = Line(g.name, [fmean(point) for point in points], *ends, style)
            drawn.setdefault(name, []).append(line)
    charts = [Chart(f"Precision, {k}", "%", lines, 0, "recall %") for k, lines in drawn.items()]
    return charts[: 1 + MOST]
