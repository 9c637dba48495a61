"""What `eval` found of the runs, from its JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.engine.report.document import Section, Table
from mdistiller.engine.report.groups import Group
from mdistiller.engine.report.numbers import estimate
from mdistiller.engine.report.runs import Run
from mdistiller.registry import UserError

_EPOCHS = {"latest": "last", "best": "best"}
_SAME = 0.3  # points: another device rounds some images to the other side
COLUMNS = {
    "nll": "loss = NLL",
    "ece": "ECE %",
    "teacher.agreement": "agrees with the teacher %",
    "teacher.kl": "KL(teacher, student)",
    "teacher.only_teacher": "only the teacher right %",
    "teacher.only_student": "only the student right %",
}
"""Numbers of an evaluation, and what a table calls them."""


def attach_evaluations(runs: Sequence[Run], file: Path) -> None:
    """Give runs what `eval --json FILE` found of their students.

    Raises:
        UserError: it is no such file, it is about none of the runs, or of a run it says another
            accuracy than the run's own, so it is of other data or other weights.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        teacher = str(contents["teacher"] or "-")
        found = [(Path(one["weights"]), float(one["top1"]), one) for one in contents["networks"]]
    except OSError as error:
        raise UserError(f"--evaluation {file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--evaluation {file} is not what eval writes with --json") from None
    by_folder = {run.folder.resolve(): run for run in runs}
    taken = 0
    for weights, top1, one in found:
        run = by_folder.get(weights.parent.resolve())
        epoch = _EPOCHS.get(weights.name.removeprefix("student_"))
        if run is not None and epoch is not None:
            own = run.number(epoch)
            if own is not None and abs(own - top1) > _SAME:
                raise UserError(
                    f"--evaluation {file} says {top1:.2f} % of {weights}, the run {own:.2f} %: it "
                    "is of other data, or the run has been trained again; run eval again"
                )
            one["compared_with"] = teacher
            run.evaluations.setdefault(epoch, one)  # a teacher's own comes last
            taken += 1
    if not taken:
        raise UserError(
            f"--evaluation {file} is about none of these runs: it has "
            f"{', '.join(str(weights) for weights, *_ in found[:3]) or 'no network'}"
        )


def evaluated(run: Run, which: str, name: str) -> float | None:
    """A number of the evaluation of a run's last or best epoch, by its dotted name."""
    value: Any = run.evaluations.get(which)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def predictions(groups: Sequence[Group], which: str) -> Section:
    """Calibration, and how the students' answers relate to their teachers'."""
    rows: list[tuple[str, dict[str, Any], str]] = []
    used: set[str] = set()
    for g in groups:
        cells = {}
        for name in COLUMNS:
            found = g.by_seed(lambda run, name=name: evaluated(run, which, name))  # type: ignore[misc]
            if found:
                cells[name] = estimate(list(found.values()))
        if cells:
            used |= cells.keys()
            said = (run.evaluations.get(which, {}).get("compared_with") for run in g.finished)
            beside = ", ".join(dict.fromkeys(name for name in said if name))
            rows.append((g.name, cells, beside))
    title = "Answers"
    if not rows:
        return Section(title)
    columns = [name for name in COLUMNS if name in used]
    shown = [
        [name, *(_cell(cells.get(c), c) for c in columns), beside] for name, cells, beside in rows
    ]
    note = (
        f"On the test set, {which} epoch, from tools/eval.py: docs/evaluation.md says what is what."
    )
    return Section(
        title, [note], [Table(["group", *map(COLUMNS.__getitem__, columns), "teacher"], shown)]
    )


def _cell(found: Any, name: str) -> str:
    if found is None:
        return "-"
    places = 4 if name.endswith(("nll", "kl")) else 2
    half = "" if found.half is None else f" ± {found.half:.{places}f}"
    return f"{found.mean:.{places}f}{half}"
