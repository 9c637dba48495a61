"""What all commands share: user errors become one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from mdistiller.registry import UserError

BAD_INPUT = 2
INTERRUPTED = 130


def guarded(command: Callable[[], None]) -> int:
    """Run `command`; 0, or the exit code of a user's error (2) or of Ctrl-C (130)."""
    try:
        command()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "error" if rank == "0" else f"error (rank {rank})"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except KeyboardInterrupt:
        advice = "continue a training run with --resume, a sweep by the same command"
        print(f"interrupted; {advice}", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The trailing KEY VALUE pairs and --import."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module that registers methods, models or data sets; may be repeated",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. SOLVER.LR 0.1"
    )
