"""train: train what a config describes."""

from __future__ import annotations

import argparse

from mdistiller.cli._run import add_overrides, guarded


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    parser.add_argument("--cfg", default="", metavar="FILE", help="YAML config (empty: defaults)")
    parser.add_argument(
        "--resume", action="store_true", help="continue this config's run from its last epoch"
    )
    add_overrides(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)

    def run() -> None:
        from mdistiller.engine.cfg import load_config
        from mdistiller.engine.run import train

        train(load_config(args.cfg, args.opts, args.imports), args.opts, resume=args.resume)

    return guarded(run)
