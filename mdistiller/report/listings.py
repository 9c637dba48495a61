"""Tables of the runs themselves: what differs between groups, grids, states, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mdistiller.report.document import Section, Table
from mdistiller.report.groups import Grid, Group, grids, measure, varying_keys
from mdistiller.report.tables import NONE, judged
from mdistiller.sweep.table import short


def settings(groups: Sequence[Group]) -> Section:
    """Config keys that differ between the groups."""
    varying = varying_keys(groups)
    if not varying:
        return Section("Settings that differ")
    rows = [
        [key, *(NONE if value is None else short(value) or "''" for value in values)]
        for key, values in varying.items()
    ]
    head = ["key", *(g.name for g in groups)]
    note = f"{NONE}: the group's method has no such key."
    return Section("Settings that differ", [note], [Table(head, rows)])


def ablations(groups: Sequence[Group], which: str, images: str) -> Section:
    """A table of two keys for every grid that the groups fill."""
    section = Section("Ablations")
    for grid in grids([g for g in groups if g.config]):
        section.tables.append(_heat(grid, which, images))
    if section.tables:
        what = f"{measure(groups)} % on the {images} images"
        section.notes.append(f"{what}, {which} epoch, mean over seeds (their number).")
        if images == "test":
            section.notes.append(
                "Who chooses a cell here chooses on the test set, and its number is too high; hold "
                "images out (DATASET.VAL_SPLIT)."
            )
    return section


def _heat(grid: Grid, which: str, images: str) -> Table:
    rows, heat = [], []
    for first in grid.axes[0]:
        cells = [grid.cells.get((str(first), str(second))) for second in grid.axes[1]]
        estimates = [judged(cell, which, images) if cell else None for cell in cells]
        heat.append([None, *(each.mean if each else None for each in estimates)])
        texts = (f"{each.mean:.2f} ({each.n})" if each else NONE for each in estimates)
        rows.append([f"{grid.keys[0]} {short(first)}", *texts])
    fixed = {key: value for key, value in grid.fixed.items() if value is not None}
    caption = f"{grid.keys[0]} by {grid.keys[1]}"
    if fixed:
        caption += f" at {', '.join(f'{key} {short(value)}' for key, value in fixed.items())}"
    head = ["", *(f"{grid.keys[1]} {short(second)}" for second in grid.axes[1])]
    return Table(head, rows, caption, heat)


def runs(groups: Sequence[Group]) -> Section:
    """Every run and what came of it."""
    rows = []
    for g in groups:
        for run in g.runs:
            best = run.summary.get("best_epoch")
            numbers = [
                NONE if value is None else f"{value:.2f}"
                for value in (run.number("last"), run.number("best"))
            ]
            state = f"{run.state}: {run.why}" if run.why else run.state
            epoch = NONE if best is None else str(best)
            rows.append([g.name, str(run.seed), state, *numbers, epoch, str(run.folder)])
    head = ["group", "seed", "state", "last", "best", "best epoch", "folder"]
    return Section("Runs", [], [Table(head, rows)])


def provenance(groups: Sequence[Group]) -> Section:
    """Code, versions and hardware, each combination once."""
    counts: Counter[tuple[str, ...]] = Counter()
    for run in (run for g in groups for run in g.runs):
        for start in run.record.get("starts", []):
            versions = start.get("versions", {})
            made = f"{start.get('device', NONE)}, {start.get('processes', 1)} process(es), "
            made += f"{start.get('threads', NONE)} thread(s) each"
            packages = ", ".join(f"{name} {version}" for name, version in versions.items())
            counts[made, packages or NONE, start.get("git") or NONE] += 1
    rows = [[*facts, str(count)] for facts, count in counts.items()]
    head = ["device", "versions", "git revision", "starts"]
    return Section("Made with", [], [Table(head, rows)] if rows else [])
