"""faults: kill runs, damage their files, fill their disk, and see whether anything is lost.

Minutes on one core. It needs fork (Linux, macOS), and trains on the embedded digits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mdistiller.cli.support.command import guarded

LOST = 1


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--suites", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="few faults of each kind")
    parser.add_argument(
        "--planted",
        nargs="?",
        const="",
        metavar="WORDS",
        help="instead, plant single-edit bugs in a copy of the package (those with WORDS in their "
        "name), and see whether a test fails for each",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="two processes, for so long")
    parser.add_argument(
        "--folder", type=Path, help="where to train, on the disk to be tried (default: temporary)"
    )
    return parser


def faults(args: argparse.Namespace, folder: Path) -> bool:
    """Run the command; True if nothing was lost."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    if args.planted is not None:
        from faults.planted import plant

        return plant(folder, args.planted)
    from faults.soak import soak
    from faults.suites import SUITES
    from faults.work import Work
    from mdistiller.registry import UserError

    unknown = set(args.suites or []) - set(SUITES)
    if unknown:
        raise UserError(f"--suites: {', '.join(sorted(unknown))}; known: {', '.join(SUITES)}")
    work = Work(folder, args.quick, args.seed)
    if args.soak:
        outcomes = [soak(work, args.soak)]
    else:
        outcomes = []
        for name in args.suites or SUITES:
            outcomes.append(SUITES[name](work))
            print(outcomes[-1].line(), flush=True)
    losses = [text for outcome in outcomes for text in outcome.losses]
    for text in losses:
        print(f"lost: {text}")
    print(f"{', '.join(outcome.line() for outcome in outcomes)}, losses: {len(losses)}")
    return not losses


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 if anything was lost."""
    args = parser().parse_args(argv)
    well = []

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            well.append(faults(args, Path(folder)))

    code = guarded(run)
    return code if code or all(well) else LOST
