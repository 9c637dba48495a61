"""A whole report from run folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.report import curves, listings, tables
from mdistiller.report.document import Report, Section
from mdistiller.report.evaluations import (
    COLUMNS,
    attach_evaluations,
    evaluated,
    predictions,
)
from mdistiller.report.groups import Group, comparable, find_baselines, group, measure
from mdistiller.report.headline import means, sentence, teachers_of
from mdistiller.report.numbers import verdict
from mdistiller.report.published import published_for
from mdistiller.report.runs import FAILED, FINISHED, read_runs


def build_report(
    paths: Sequence[Path],
    baseline: str | None = None,
    which: str = "last",
    reach: float | None = None,
    title: str = "Comparison of runs",
    evaluations: Sequence[Path] = (),
) -> Report:
    """A report on all runs in and below some folders.

    Args:
        baseline: name of the group that others are compared with; by default plain training.
        which: the accuracy that is compared, of the "last" or the "best" epoch.
        reach: accuracy in %, to which convergence is measured.
        evaluations: what `eval --json` wrote about the runs.

    Raises:
        UserError: a folder holds no run, or no group is called `baseline`.
    """
    runs = read_runs(paths)
    for file in evaluations:
        attach_evaluations(runs, file)
    groups = group(runs)
    bases = find_baselines(groups, baseline)
    images = tables.chosen_by(groups)
    groups.sort(key=lambda g: _rank(g, bases, which, images))
    teachers = teachers_of(groups, bases)
    students = [g for g in groups if g not in teachers]
    each: list[Group | None] = [*bases] or [None]
    sections = [
        _means(students, bases, which),
        tables.accuracy(groups, teachers),
        *(s for base in each for s in _compare(groups, base, bases, which, reach)),
        *_details(groups, which, images),
    ]
    kept = [s for s in sections if s.notes or s.tables or s.charts or s.means]
    results = [sentence(_beside(students, b, bases), b, which, images) for b in each]
    lead = [*filter(None, results), *_lead(groups, bases)]
    numbers = _numbers(groups, bases, which, reach, teachers)
    return Report(title, lead, kept, numbers, measure(groups))


def _means(students: Sequence[Group], bases: Sequence[Group], which: str) -> Section:
    """The charts of means, one for each baseline."""
    section = Section("Means")
    each: list[Group | None] = [*bases] or [None]
    for base in each:
        chart = means(_beside(students, base, bases), base, which)
        chart.title += f", {base.name}" if base and len(bases) > 1 else ""
        if len(chart.points) > 1:
            section.means.append(chart)
    if section.means:
        section.notes.append(
            "Dots are means over seeds, bars their 95 % confidence intervals"
            + (", the dashed line is the baseline." if bases else ".")
        )
    return section


def _compare(
    groups: Sequence[Group],
    base: Group | None,
    bases: Sequence[Group],
    which: str,
    reach: float | None,
) -> list[Section]:
    """The sections with a baseline; it is named in their titles if there are several."""
    groups = _beside(groups, base, bases)
    sections = [
        tables.differences(groups, base, which),
        curves.learning(groups, base),
        curves.convergence(groups, base, reach),
        curves.loss_terms(groups, base),
    ]
    for section in sections:
        section.title += f", {base.name}" if base and len(bases) > 1 else ""
    return sections


def _details(groups: Sequence[Group], which: str, images: str) -> list[Section]:
    """The sections without a baseline, behind those with one."""
    return [
        tables.published(groups),
        listings.ablations(groups, which, images),
        tables.teachers(groups),
        tables.peers(groups),
        predictions(groups, which),
        tables.cost(groups),
        listings.settings(groups),
        listings.runs(groups),
        listings.provenance(groups),
    ]


def _beside(groups: Sequence[Group], base: Group | None, bases: Sequence[Group]) -> list[Group]:
    """The groups that a baseline's sections speak of: not those that another one has."""
    others = [other for other in bases if other is not base]
    return [g for g in groups if not any(comparable(g, other) for other in others)]


def _rank(
    g: Group, bases: Sequence[Group], which: str, images: str
) -> tuple[int, bool, bool, float]:
    """Sort key: by baseline, which comes first, then by accuracy; without a finished run last."""
    estimate = tables.judged(g, which, images)
    number = next((i for i, base in enumerate(bases) if comparable(g, base)), len(bases))
    return number, g not in bases, estimate is None, -estimate.mean if estimate else 0.0


def _lead(groups: Sequence[Group], bases: Sequence[Group]) -> list[str]:
    states = Counter(run.state for g in groups for run in g.runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lead = [f"{states.total()} runs in {len(groups)} groups that differ in more than the seed: "]
    lead[0] += f"{counts}."
    if states[FINISHED] < states.total():
        lead.append("Only finished runs are in the numbers; the others are listed under “Runs”.")
    if bases:
        names = "; ".join(base.name for base in bases)
        lead.append(f"Baseline{'s' if len(bases) > 1 else ''}: {names}.")
    return lead


def _numbers(
    groups: Sequence[Group],
    bases: Sequence[Group],
    which: str,
    reach: float | None,
    teachers: Sequence[Group],
) -> list[dict[str, Any]]:
    rows = []
    for g in groups:
        base = next((base for base in bases if comparable(g, base)), None)
        reference = base or (bases[0] if len(bases) == 1 else None)
        wanted = curves.goal(_beside(groups, reference, bases), reference, reach)
        role = "teacher" if g in teachers else "baseline" if g is base else "student"
        found = tables.gaps(groups, base, which).get(g.name) if base else None
        rows.append({"role": role, **_row(g, base, found, which, wanted)})
    return rows


def _row(
    g: Group, base: Group | None, found: Any, which: str, wanted: float | None
) -> dict[str, Any]:
    states = Counter(run.state for run in g.runs)
    row: dict[str, Any] = {
        "group": g.name,
        "runs": len(g.runs),
        "finished": states[FINISHED],
        "failed": states[FAILED],
    }
    for kind in ("last", "best"):
        estimate = tables.over_seeds(g, kind)
        row[f"{kind}_mean"] = estimate.mean if estimate else None
        row[f"{kind}_ci95"] = estimate.half if estimate else None
        row[f"{kind}_seeds"] = estimate.n if estimate else 0
    row["selected_on"] = "; ".join(g.facts("selected_on"))
    gap, holm = found or (None, None)
    row |= {
        "baseline": base.name if base else None,
        f"{which}_difference": gap.mean if gap else None,
        "difference_ci95": gap.half if gap else None,
        "p": gap.p if gap else None,
        "p_holm": holm,
        "verdict": verdict(gap, holm) if gap else None,
        "pairs": gap.n if gap else None,
    }
    hits = [hit for run in g.finished if wanted and (hit := curves.reached(run, wanted))]
    row["goal"] = wanted
    row["epochs_to_goal"] = sum(epochs for epochs, _ in hits) / len(hits) if hits else None
    for key in ("teacher_acc", "seconds", "images_per_second", "parameters"):
        values = g.by_seed(lambda run, key=key: run.summary.get(key)).values()  # type: ignore[misc]
        row[key] = sum(values) / len(values) if values else None
    row["peak_memory_mib"] = max(g.facts("peak_memory_mib"), default=None)
    for name in COLUMNS:
        values = g.by_seed(lambda run, name=name: evaluated(run, which, name)).values()  # type: ignore[misc]
        row[name] = sum(values) / len(values) if values else None
    papers = published_for(g.config)
    row["published"] = "; ".join(f"{line.top1:.2f}" for line in papers)
    row["published_source"] = "; ".join(line.source for line in papers)
    return row
