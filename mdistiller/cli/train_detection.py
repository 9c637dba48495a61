"""train_detection: train a detector, alone or under a teacher (docs/detection.md)."""

from __future__ import annotations

from mdistiller.cli.support.command import guarded
from mdistiller.cli.train import follow, parser
from mdistiller.engine.config.early import check_early


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser("train_detection", __doc__).parse_intermixed_args(argv)

    def run() -> None:
        check_early((args.cfg or [""])[0], args.opts, args.imports, "train_detection")
        from mdistiller.detection.config import load_config
        from mdistiller.detection.run import train

        follow(args, load_config, train)

    return guarded(run)
