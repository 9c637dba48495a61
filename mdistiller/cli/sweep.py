"""sweep: train all that a sweep file asks for, side by side, and print a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.cli.support.command import add_overrides, guarded
from mdistiller.registry import UserError
from mdistiller.sweep.fields import check_file

if TYPE_CHECKING:
    from mdistiller.sweep.plan import Plan

FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the sweep file")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: GPUs, or cores)")
    parser.add_argument("--storage", metavar="URL", help="SQL database; default OUT/study.db")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default output/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="check and print the trials")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    parser.add_argument("--retry", action="store_true", help="run failed trials again")
    add_overrides(parser)
    return parser


def print_trials(plan: Plan) -> None:
    """What would run."""
    for trial in plan.trials:
        print(f"{trial.name}  {' '.join(map(str, trial.changes))}".rstrip())
    if plan.space:
        print(*(f"{key}: {axis}" for key, axis in plan.space.items()), sep="\n")
    runs = sum(len(trial.configs) for trial in plan.trials)
    print(f"{len(plan.trials)} trials, {runs} runs; results in {plan.out}")


def sweep(args: argparse.Namespace) -> bool:
    """Run the command; True if all went well."""
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    try:
        check_file(args.cfg, args.opts, args.imports)
    except UserError as error:
        raise UserError(f"{args.cfg}: {error}") from None
    from mdistiller.sweep import table
    from mdistiller.sweep.plan import read_plan

    plan = read_plan(args.cfg, args.opts, args.imports, args.out)
    if plan.space and not plan.trials[0].configs[0].DATASET.VAL_SPLIT:
        print("WARNING: this search selects on the test set; hold images out: DATASET.VAL_SPLIT")
    if args.dry_run:
        print_trials(plan)
        return True
    from mdistiller.sweep.study import Study
    from mdistiller.sweep.work import run_sweep

    file = plan.out / "study.db"
    if args.table and not args.storage and not file.is_file():
        raise UserError(f"no study {file} yet")
    plan.out.mkdir(parents=True, exist_ok=True)
    plan.write_teachers()
    url = args.storage or f"sqlite:///{file.resolve()}"
    study = Study(plan, url, create=not args.table)
    study.check_settings()
    if args.retry:
        study.reset()
    if not args.table:
        run_sweep(study, args.jobs)
    rows = table.rows(plan, study.status())
    text = table.markdown(plan, rows)
    (plan.out / "table.md").write_text(text + "\n")
    (plan.out / "table.csv").write_text(table.csv_text(plan, rows))
    print(f"\n{text}\n\ntable.md, table.csv and all runs are in {plan.out}")
    return table.all_well(plan, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 if a trial failed."""
    args = parser().parse_intermixed_args(argv)
    well = []
    code = guarded(lambda: well.append(sweep(args)))
    return code if code or all(well) else FAILED
