"""train: train what a config describes."""

from __future__ import annotations

import argparse
import sys
from typing import Literal

from mdistiller.cli._run import add_overrides, guarded


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    parser.add_argument("--cfg", default="", metavar="FILE", help="YAML config (empty: defaults)")
    parser.add_argument(
        "--resume",
        choices=("yes", "auto"),
        help="continue this config's run from its last checkpoint (--resume alone, or yes); auto: "
        "if it has one, else start it",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue also under settings that change what is trained",
    )
    add_overrides(parser)
    return parser


def spelled_out(words: list[str]) -> list[str]:
    """A command line in which --resume always has a value: KEY VALUE pairs may follow it."""
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--resume=yes" and word in ("auto", "yes"):
            out[-1] = f"--resume={word}"
        else:
            out.append("--resume=yes" if word == "--resume" else word)
    return out


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_intermixed_args(spelled_out(words))

    def run() -> None:
        from mdistiller.engine.cfg import load_config
        from mdistiller.engine.run import train

        resume: bool | Literal["auto"] = "auto" if args.resume == "auto" else bool(args.resume)
        cfg = load_config(args.cfg, args.opts, args.imports)
        train(cfg, args.opts, resume=resume, allow_changes=args.allow_changes)

    return guarded(run)
