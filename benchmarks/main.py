"""benchmark: measured speed of the library's parts.

losses   every classical method's loss, forward and backward, against the textbook form that
         the tests keep: time, ratio, and with --memory the peak memory of both
loader   images per second of ImageNet's training pipeline on 500 generated JPEGs, against
         torchvision's plain one with as many --workers
photographs
         images per second of CPU time from JPEGs of 12 megapixels and of 500 x 400 pixels, with
         and without DATASET.JPEG_SCALING
commands CPU seconds until help, an error message or the table of methods is there
together CPU seconds of nine short runs under one teacher, one after the other and in lock-step
         (KEY VALUE for all of them, such as DISTILLER.TEACHER resnet32x4)
step     a training step of --cfg CONFIG [KEY VALUE ...] on generated images: its parts, its share
         of the machine's peak, and the same step in a bare and in a classic loop
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.commands import commands, together
from benchmarks.loaders import loader
from benchmarks.photographs import photographs
from benchmarks.step import add_step_arguments, step
from mdistiller.cli.support.command import add_overrides, guarded
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, help="what to measure")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--batch", type=int, help="images in a batch (default 64, or the config's)")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each form")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some cases (default all)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="commands, together: an earlier version"
    )
    add_step_arguments(parser)
    add_overrides(parser)
    return parser


def loss_cases(batch: int, device: str) -> dict[str, Any]:
    """The tests' pairs of loss and textbook form; they are in a checkout, not in the package."""
    from benchmarks.textbook import kept_with_tests

    cases: dict[str, Any] = kept_with_tests("loss_cases").loss_cases(batch, device)
    return cases


def loss_step(name: str, form: str, batch: int, device: str) -> Callable[[], None]:
    """Forward and backward of one form ("ours" or "textbook") of a case."""
    return step_of(loss_cases(batch, device)[name], form)


def step_of(case: Any, form: str) -> Callable[[], None]:
    """A call that runs a form of a case forward and backward."""
    import torch

    loss = getattr(case, form)

    def step() -> None:
        torch.autograd.grad(loss(*case.inputs), case.inputs)

    return step


def losses(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row a case."""
    from benchmarks.memory import peak_growth
    from mdistiller.cli.support.timing import race
    from mdistiller.registry import Registry

    cases = Registry("loss case")
    cases.update(loss_cases(args.batch, device))
    rows = []
    titles = ["loss", "ours, ms", "textbook, ms", "ratio"]
    if args.memory:
        titles += ["ours, MiB", "textbook, MiB"]
    lines = []
    for name in tqdm(args.only or list(cases), disable=None):
        steps = {form: step_of(cases[name], form) for form in ("ours", "textbook")}
        times = race(steps, device, args.rounds)
        row: dict[str, Any] = {"loss": name, **times}
        row["ratio"] = times["textbook"]["ms"] / times["ours"]["ms"]
        cells = [
            name,
            *(f"{t['ms']:.2f} ({t['low']:.2f}-{t['high']:.2f})" for t in times.values()),
            f"{row['ratio']:.2f}",
        ]
        if args.memory:
            row["peak_mib"] = {
                form: peak_growth(loss_step, name, form, args.batch, device, device=device)
                for form in steps
            }
            cells += [f"{value:.0f}" for value in row["peak_mib"].values()]
        lines.append(cells)
        rows.append(row)
    print(markdown_table(titles, lines))
    return rows


SUITES: dict[str, Callable[[argparse.Namespace, str], list[dict[str, Any]]]] = {
    "losses": losses,
    "loader": loader,
    "photographs": photographs,
    "commands": commands,
    "together": together,
    "step": step,
}


def benchmark(args: argparse.Namespace) -> None:
    """Measure, print a table, write JSON if asked."""
    import torch

    from mdistiller.cli.support.timing import surroundings
    from mdistiller.runtime import resolve_device

    if args.suite != "step":
        if args.cfg or (args.opts and args.suite != "together"):
            raise UserError(f"--cfg and KEY VALUE belong to the suite step, not to {args.suite}")
        args.batch = 64 if args.batch is None else args.batch
    if args.against is not None and args.suite not in ("commands", "together"):
        raise UserError(f"--against belongs to the suites commands and together, not {args.suite}")
    counts = [args.rounds, args.threads, *([] if args.batch is None else [args.batch])]
    if min(counts) < 1 or args.workers < 0:
        raise UserError("--rounds, --batch and --threads must be at least 1, --workers at least 0")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {args.json.absolute().parent}")
    torch.set_num_threads(args.threads)
    device = str(resolve_device(args.device))
    facts = {**surroundings(device), "rounds": args.rounds}
    if args.batch is not None:
        facts["batch"] = args.batch
    if args.suite != "losses":
        facts["workers"] = args.workers
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows = SUITES[args.suite](args, device)
    if args.json is not None:
        args.json.write_text(json.dumps({**facts, args.suite: rows}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    return guarded(lambda: benchmark(args))
