"""report: what runs amount to, over seeds and against a baseline; Markdown, CSV or an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from mdistiller.cli.support.command import command_line
from mdistiller.files.tables import csv_table
from mdistiller.registry import UserError


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them"
    )
    parser.add_argument("--baseline", metavar="GROUP", help="default: the one of plain training")
    parser.add_argument(
        "--metric", choices=("last", "best"), default="last", help="epoch to compare (default last)"
    )
    parser.add_argument("--reach", type=float, metavar="X", help="convergence: epochs to X %%")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="what eval or eval_detection --json wrote about the runs; may be repeated",
    )
    parser.add_argument("--title", default="Comparison of runs")
    parser.add_argument("--md", type=Path, metavar="FILE", help="Markdown (default: printed)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row a group, unrounded")
    parser.add_argument(
        "--latex",
        type=Path,
        metavar="FILE",
        help="table of accuracies and differences (booktabs); - prints it",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with the curves")
    return parser


def write(file: Path, text: str) -> None:
    """Write a file and its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    print(f"wrote {file}")


def report(args: argparse.Namespace) -> None:
    """Run the command."""
    for path in args.runs:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, or folders above them")
    from mdistiller.report.build import build_report
    from mdistiller.report.document import markdown
    from mdistiller.report.latex import latex
    from mdistiller.report.page import page

    if args.reach is not None and not 0 < args.reach <= 100:
        raise UserError(f"--reach must be above 0 and at most 100, got {args.reach:g}")
    report = build_report(
        args.runs, args.baseline, args.metric, args.reach, args.title, args.evaluation
    )
    texts = {
        args.md: lambda: markdown(report),
        args.csv: lambda: csv_table(report.numbers),
        args.html: lambda: page(report),
        args.latex: lambda: latex(report.numbers, args.metric, report.unit),
    }
    files = {file: text for file, text in texts.items() if file is not None}
    for file, text in files.items():
        if file == Path("-"):
            print(text(), end="")
        else:
            write(file, text())
    if not files:
        print(markdown(report), end="")


main = command_line(parser, report)
