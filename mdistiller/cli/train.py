"""train: train what a config describes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Literal

from mdistiller.cli.support.command import add_overrides, guarded
from mdistiller.cli.support.fork_flags import add_fork_flags, fork_overrides
from mdistiller.engine.config.early import check_early
from mdistiller.registry import UserError


class _Parser(argparse.ArgumentParser):
    """Takes `--resume` without a value although KEY VALUE pairs may follow it."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and words[-1] == "--resume=yes" and word in ("auto", "yes"):
                words[-1] = f"--resume={word}"
            else:
                words.append("--resume=yes" if word == "--resume" else word)
        return super().parse_intermixed_args(words, namespace)


def parser(prog: str = "train", about: str = __doc__) -> argparse.ArgumentParser:
    """The command's arguments, which are those of every command that trains."""
    parser = _Parser(prog=prog, description=about)
    parser.add_argument(
        "--cfg",
        action="append",
        metavar="FILE",
        help="YAML config (default: all defaults); several train in lock-step: they share batches, "
        "and the passes of one teacher",
    )
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
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole config, and train nothing"
    )
    add_overrides(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = parser()
    add_fork_flags(words)
    args = words.parse_intermixed_args(argv)
    files = args.cfg or [""]

    def run() -> int:
        for file in files:
            check_early(file, args.opts, args.imports)
        from mdistiller.engine.cfg import load_config, method_nodes
        from mdistiller.engine.run.train import train

        if args.logit_stand or args.same_t or {args.base_temp, args.kd_weight} != {None}:
            if len(files) > 1:
                raise UserError(
                    "the options of forks' commands go with one --cfg: set KEY VALUE pairs, or "
                    "put them into the configs"
                )
            cfg = load_config(files[0], args.opts, args.imports)
            args.opts = [*fork_overrides(args, cfg, method_nodes(cfg)), *args.opts]
        if len(files) == 1 or args.print_config:
            for file in files:
                follow(args, file, load_config, train)
            return 0
        return train_all([load_config(file, args.opts, args.imports) for file in files], args)

    codes: list[int] = []
    return guarded(lambda: codes.append(run())) or codes[0]


def follow(args: Any, file: str, load: Callable[..., Any], train: Callable[..., Any]) -> None:
    """Train by a config, or print it, as the arguments say."""
    cfg = load(file, args.opts, args.imports)
    if args.print_config:
        from mdistiller.engine.cfg import show_cfg

        show_cfg(cfg)
    else:
        train(cfg, args.opts, **_how(args))


def _how(args: Any) -> dict[str, Any]:
    resume: bool | Literal["auto"] = "auto" if args.resume == "auto" else bool(args.resume)
    return {"resume": resume, "allow_changes": args.allow_changes}


def train_all(configs: list[Any], args: Any) -> int:
    """Train several configs in lock-step; the exit code is that of the first run that failed."""
    from mdistiller.engine.run.naming import experiment_name
    from mdistiller.engine.run.train import train_together

    outcomes = train_together(configs, args.opts, **_how(args))
    code = 0
    for cfg, outcome in zip(configs, outcomes, strict=True):
        if outcome.error is not None:
            print(f"{experiment_name(cfg, args.opts)} failed:", file=sys.stderr, flush=True)
            code = guarded(outcome.reraise) or code
    return code
