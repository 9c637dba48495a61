"""train_detection: train a detector, alone or under a teacher (docs/detection.md)."""

from __future__ import annotations

from mdistiller.cli.support.command import guarded
from mdistiller.cli.train import check_resume, follow, parser
from mdistiller.config.early import check_early
from mdistiller.registry import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser("train_detection", __doc__).parse_intermixed_args(argv)

    def run() -> None:
        file, *others = args.cfg or [""]
        if others:
            raise UserError("--cfg names one config here; only `train` takes several")
        check_resume(args)
        check_early(file, args.opts, args.imports, "train_detection")
        from mdistiller.detection.config import load_config
        from mdistiller.detection.run import train

        follow(args, file, load_config, train)

    return guarded(run)
