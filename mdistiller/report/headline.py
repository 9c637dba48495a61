"""What a reader sees first: the result in a sentence, and the means side by side."""

from __future__ import annotations

from collections.abc import Sequence

from mdistiller.report.curves import MOST
from mdistiller.report.document import Mean, Means
from mdistiller.report.groups import Group, comparable, comparable_groups, measure
from mdistiller.report.numbers import verdict
from mdistiller.report.tables import gaps, judged, over_seeds, plus_minus


def teachers_of(groups: Sequence[Group], bases: Sequence[Group]) -> list[Group]:
    """Groups that trained the teacher of others and compare with none of them."""

    def teaches(g: Group, other: Group) -> bool:
        pairs = (("DISTILLER.STUDENT", "DISTILLER.TEACHER"), ("DATASET.TYPE", "DATASET.TYPE"))
        return other.config.get("DISTILLER.TYPE", "NONE") != "NONE" and all(
            g.config.get(ours) == other.config.get(theirs) for ours, theirs in pairs
        )

    found = []
    for g in groups:
        others = [other for other in groups if other is not g]
        alone = g not in bases and not any(comparable(g, other) for other in others)
        if g.config and alone and any(teaches(g, other) for other in others):
            found.append(g)
    return found


def sentence(students: Sequence[Group], base: Group | None, which: str, images: str) -> str | None:
    """The best group, how far it is above the baseline, and what that is worth."""
    scores = {g.name: judged(g, which, images) for g in comparable_groups(students, base)}
    ranked = [g for g in students if scores.get(g.name) is not None]
    if not ranked:
        return None
    best = max(ranked, key=lambda g: scores[g.name].mean)  # type: ignore[union-attr]
    value = over_seeds(best, which)
    assert value is not None
    seeds = "one seed" if value.n == 1 else f"{value.n} seeds"
    text = f"{best.name} {plus_minus(value)} % ({measure([best])} on the test set, {which} epoch, "
    text += f"{seeds})"
    if len(ranked) == 1:
        return f"{text}."
    chosen = "" if images == "test" else " on held-out images"
    if base is None:
        return (
            f"{text}: the highest of {len(ranked)} groups{chosen}. No baseline: name one of the "
            "groups with --baseline."
        )
    if best is base:
        return f"{text}: no group is above the baseline{chosen}."
    gap, p = gaps(students, base, which)[best.name]
    if gap is None:
        return (
            f"{text}: the highest of {len(ranked)} groups{chosen}; no seed in common with "
            f"{base.name}."
        )
    tested = "" if p is None else f"p = {p:.2g}, "
    return f"{text}, {plus_minus(gap, '+')} points over {base.name} ({tested}{verdict(gap, p)})."


def means(students: Sequence[Group], base: Group | None, which: str) -> Means:
    """The chart of means with intervals, the best first; colours as in the curves, which have
    `curves.MOST`."""
    points = []
    for number, g in enumerate(comparable_groups(students, base)):
        value = over_seeds(g, which)
        if value is not None:
            style = number % MOST
            points.append(Mean(g.name, value.mean, value.half, plus_minus(value), style))
    reference = over_seeds(base, which) if base else None
    points.sort(key=lambda point: -point.mean)
    title = f"{measure(students)} on the test set in %, {which} epoch"
    return Means(title, points, reference.mean if reference else None)
