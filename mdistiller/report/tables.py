"""Tables of results: accuracy, differences, published numbers, teachers, cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mdistiller.report.document import Section, Table
from mdistiller.report.groups import Group, comparable, comparable_groups, measure, otherwise
from mdistiller.report.numbers import (
    FEWEST,
    Difference,
    Estimate,
    difference,
    estimate,
    holm,
    verdict,
)
from mdistiller.report.published import departures, published_for
from mdistiller.report.runs import Run

NONE = "-"


def over_seeds(group: Group, which: str) -> Estimate | None:
    """Accuracy on the test set of the last or the best epoch."""
    return estimate(list(group.by_seed(lambda run: run.number(which)).values()))


def chosen_by(groups: Sequence[Group]) -> str:
    """What settings are to be chosen by: "held-out" images if all groups have them, or "test"."""
    finished = [run for g in groups for run in g.finished]
    return "held-out" if all(run.held_out("last") is not None for run in finished) else "test"


def judged(group: Group, which: str, images: str) -> Estimate | None:
    """Accuracy on what settings are chosen by."""
    if images == "test":
        return over_seeds(group, which)
    return estimate(list(group.by_seed(functools.partial(Run.held_out, which=which)).values()))


def plus_minus(estimate: Estimate | None, sign: str = "", most: int = 2) -> str:
    """An estimate to the second digit of its interval's half width, to `most` places at most."""
    if estimate is None:
        return NONE
    if estimate.half is None:
        return f"{estimate.mean:{sign}.{most}f}"
    small = estimate.half < 10.0**-most
    places = most if small else min(most, max(0, 1 - math.floor(math.log10(estimate.half))))
    return f"{estimate.mean:{sign}.{places}f} ± {estimate.half:.{places}f}"


def joined(values: Sequence[Any]) -> str:
    return "; ".join(map(str, values)) or NONE


def accuracy(groups: Sequence[Group], teachers: Sequence[Group] = ()) -> Section:
    """Mean and interval over seeds, last and best; the teachers in a table of their own."""
    split = any(run.held_out("best") is not None for g in groups for run in g.finished)
    unit = f"test {measure(groups)} %"
    head = ["group", "seeds", f"last epoch, {unit}", f"best epoch, {unit}"]
    head += ["best epoch selected on"]
    head += ["last, held-out", "best, held-out"] if split else []
    students = [g for g in groups if g not in teachers]
    shown = [Table(head, [_accuracies(g, split) for g in students])]
    if teachers:
        shown[0].caption = "Students"
        shown.append(Table(head, [_accuracies(g, split) for g in teachers], "Teachers"))
    notes = ["Mean ± half the 95 % confidence interval over seeds (t distribution)."]
    if split and chosen_by(groups) == "held-out":
        notes.append("Groups are in the order of their held-out accuracy.")
    if any((last := over_seeds(g, "last")) and last.n == 1 for g in groups):
        notes.append("One seed has no interval: nothing is known of how much another would differ.")
    if any("test set" in g.facts("selected_on") for g in groups):
        notes.append(
            "A best epoch that was selected on the test set is too high a number; "
            "compare last epochs, or hold out images (DATASET.VAL_SPLIT)."
        )
    repeated = [
        f"{g.name} (seed {', '.join(map(str, g.repeated_seeds()))})"
        for g in groups
        if g.repeated_seeds()
    ]
    if repeated:
        notes.append(f"Several runs of one seed count as their mean: {'; '.join(repeated)}.")
    return Section("Accuracy", notes, shown)


def _accuracies(g: Group, split: bool) -> list[str]:
    """The row of a group; with `split`, its accuracies on held-out images as well."""
    last, best = over_seeds(g, "last"), over_seeds(g, "best")
    row = [g.name, str(last.n if last else 0), plus_minus(last), plus_minus(best)]
    by = [f"by {name.replace('_', ' ')}" for name in g.facts("selected_by") if name != "top1"]
    row.append(joined([*g.facts("selected_on"), *by]))
    for which in ("last", "best") if split else ():
        row.append(plus_minus(judged(g, which, "held-out")))
    return row


def _difference(name: str, gap: Difference | None, adjusted: float | None) -> list[str]:
    if gap is None:
        return [name, "no seed in common", NONE, "0", NONE, NONE]
    ps = (NONE if p is None else f"{p:.3g}" for p in (gap.p, adjusted))
    return [name, verdict(gap, adjusted), plus_minus(gap, "+"), str(gap.n), *ps]


def _trained_otherwise(groups: Sequence[Group], base: Group) -> list[str]:
    """A note on each group that differs from the baseline in more than its method."""
    notes = []
    for g in comparable_groups(groups, base):
        words = [f"{k} {ours} against {their}" for k, ours, their in otherwise(g, base)]
        notes += [f"{g.name} was trained otherwise as well: {', '.join(words)}."] if words else []
    return notes


def gaps(
    groups: Sequence[Group], base: Group, which: str
) -> dict[str, tuple[Difference | None, float | None]]:
    """Each comparable group's difference to the baseline, and its p-value by Holm's adjustment."""

    def number(run: Run) -> float | None:
        return run.number(which)

    found = {
        g.name: difference(*(each.by_seed(number) for each in (g, base)))
        for g in comparable_groups(groups, base)
        if g is not base
    }
    ps = {k: gap.p for k, gap in found.items() if gap and gap.p is not None and gap.n >= FEWEST}
    adjusted = dict(zip(ps, holm(list(ps.values())), strict=True))
    return {name: (gap, adjusted.get(name)) for name, gap in found.items()}


def differences(groups: Sequence[Group], base: Group | None, which: str) -> Section:
    """Each group against the baseline, seed by seed."""
    section = Section("Differences to the baseline")
    if base is None:
        return section
    found = gaps(groups, base, which)
    ps = [adjusted for _, adjusted in found.values() if adjusted is not None]
    rows = [_difference(name, *gap) for name, gap in found.items()]
    apart = [g.name for g in groups if not comparable(g, base)]
    head = ["group", "verdict", f"points above {base.name}", "pairs", "p", "p, Holm"]
    section.tables.append(Table(head, rows))
    unit = measure(groups)
    section.notes.append(
        f"{unit[0].upper()}{unit[1:]} on the test set, {which} epoch, against {base.name} with the "
        "same seed: mean difference ± half its 95 % interval, and the paired t-test."
    )
    if len(ps) > 1:
        section.notes.append(
            f"These are {len(ps)} tests: of groups that do not differ, one in twenty gets a p "
            "below 0.05. The verdict goes by Holm's adjustment, which is for all of them together."
        )
    if rows:
        section.notes.append(
            "“Not told apart” does not mean equal: the interval says which differences remain "
            "possible."
        )
    section.notes += _trained_otherwise(groups, base)
    if apart:
        section.notes.append(
            f"Not compared, because student, data set or split is another: {', '.join(apart)}."
        )
    return section


def published(groups: Sequence[Group]) -> Section:
    """Groups beside what papers report."""
    head = ["group", "ours, last", "ours, best", "published", "best - published", "as", "source"]
    rows = []
    for g in groups:
        last, best = over_seeds(g, "last"), over_seeds(g, "best")
        for line in published_for(g.config) if best else []:
            gap = f"{best.mean - line.top1:+.2f}" if best else NONE
            source = line.source if line.verified else f"{line.source} (not verified)"
            row = [g.name, plus_minus(last), plus_minus(best), f"{line.top1:.2f}", gap]
            rows.append(
                [*row, line.method, source, joined(departures(g.config, line, g.processes))]
            )
    title = "Beside published numbers"
    if not rows:
        return Section(title)
    note = (
        "Published numbers are, unless a paper says otherwise, the best epoch on the test set, "
        "of one or a few runs, seldom with an interval."
    )
    return Section(title, [note], [Table([*head, "ours has another protocol"], rows)])


def teachers(groups: Sequence[Group]) -> Section:
    """Teacher accuracy, and how far the student is from it."""
    head = ["group", "teacher", f"its {measure(groups)} %", "student, last", "student - teacher"]
    rows = []
    for g in groups:
        theirs = g.by_seed(lambda run: run.summary.get("teacher_acc"))
        teacher = estimate(list(theirs.values()))
        if teacher:
            same = g.by_seed(lambda run: run.number("last"))
            gap = difference(same, theirs)
            several = g.config.get("DISTILLER.TEACHERS")
            name = " + ".join(entry["NAME"] for entry in several or ())
            name = name or str(g.config.get("DISTILLER.TEACHER", NONE))
            rows.append([g.name, name, f"{teacher.mean:.2f}"])
            rows[-1] += [plus_minus(estimate(list(same.values()))), plus_minus(gap, "+")]
    if not rows:
        return Section("Teacher and student")
    note = (
        "Both on the test set. On what the two agree: "
        "tools/eval.py RUNS --json FILE, and --evaluation FILE here."
    )
    return Section("Teacher and student", [note], [Table(head, rows)])


def peers(groups: Sequence[Group]) -> Section:
    """Accuracy of the networks that were trained beside the student (DISTILLER.PEERS)."""
    unit = f"test {measure(groups)} %"
    head = ["group", "peer", "network", f"last epoch, {unit}", f"best epoch, {unit}"]
    rows = []
    for g in groups:
        entries = g.config.get("DISTILLER.PEERS") or [{"NAME": g.config.get("DISTILLER.STUDENT")}]
        for number, entry in enumerate(entries, start=1):
            found = [
                estimate(
                    list(
                        g.by_seed(
                            lambda run, n=number, w=which: run.summary.get(  # type: ignore[misc]
                                f"peer{n}_test_acc_{w}", run.summary.get(f"peer{n}_{w}_acc")
                            )
                        ).values()
                    )
                )
                for which in ("last", "best")
            ]
            if found[0]:
                rows.append([g.name, str(number), entry["NAME"], *map(plus_minus, found)])
    note = (
        "Networks trained beside the student; their files are `student_peer1_latest` and the like."
    )
    return Section("Peers", [note], [Table(head, rows)]) if rows else Section("Peers")


def cost(groups: Sequence[Group]) -> Section:
    """Time, speed, size and memory."""
    head = ["group", "seconds a run", "training images/s", "parameters", "peak memory, MiB", "of"]
    rows = []
    for g in groups:
        if not g.finished:
            continue
        row = [g.name]
        for key, form in (("seconds", ",.1f"), ("images_per_second", ",.0f")):
            values = [run.summary[key] for run in g.finished if run.summary.get(key)]
            row.append(format(fmean(values), form) if values else NONE)
        row.append(joined([f"{count:,}" for count in g.facts("parameters")]))
        memory = g.facts("peak_memory_mib")
        row.append(f"{max(memory):,.0f}" if memory else NONE)
        rows.append([*row, joined(g.facts("peak_memory_of"))])
    if not rows:
        return Section("Cost")
    notes = ["Means over the runs; of memory the largest. Parameters are the student's."]
    if any(row[-1] == "process" for row in rows):
        notes.append(
            "Memory of a process is the most it ever held, data and earlier runs of it included."
        )
    return Section("Cost", notes, [Table(head, rows)])
