"""train: train what a config describes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mdistiller.cli.support.command import FAILED, add_overrides, guarded
from mdistiller.cli.support.fork_flags import add_fork_flags, fork_overrides
from mdistiller.config.early import check_early
from mdistiller.config.files import require_run
from mdistiller.registry import UserError


class _Parser(argparse.ArgumentParser):
    """Takes `--resume` without a value although KEY VALUE pairs may follow it, and configs without
    `--cfg` before these."""

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and words[-1] == "--resume=yes" and (word in WORDS or _is_folder(word)):
                words[-1] = f"--resume={word}"
            else:
                words.append("--resume=yes" if word == "--resume" else word)
        found = super().parse_intermixed_args(words, namespace)
        while found.opts and found.opts[0].endswith(YAML):
            found.cfg = [*(found.cfg or []), found.opts.pop(0)]
        return found


YAML = (".yaml", ".yml")
WORDS = ("yes", "auto")
"""Values of --resume that name no folder."""


def _is_folder(word: str) -> bool:
    """Whether a word names a folder, and no config key."""
    named = not word.startswith("-") and not word.partition(".")[0].isupper()
    return not word.endswith(YAML) and ("/" in word or named or Path(word).is_dir())


def parser(prog: str = "train", about: str = __doc__) -> argparse.ArgumentParser:
    """The command's arguments, which are those of every command that trains."""
    parser = _Parser(prog=prog, description=about)
    parser.add_argument(
        "--cfg",
        "--config",
        action="append",
        metavar="FILE",
        help="YAML config (default: all defaults; --cfg may be left out); several train in "
        "lock-step: they share batches, and the passes of one teacher",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a run folder from its last checkpoint, by the config in it; without RUN the "
        "run of this config; auto: if it has a checkpoint, else start it",
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
        _check_words(args.opts)
        check_resume(args)
        for file in files:
            check_early(file, args.opts, args.imports)
        from mdistiller.engine.cfg import load_config, method_nodes
        from mdistiller.run.train import train

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


def _check_words(words: list[str]) -> None:
    """Refuse a lone word before the KEY VALUE pairs, such as a run folder or a config's name."""
    if len(words) % 2 and not words[0].partition(".")[0].isupper():
        run = (Path(words[0]) / "config.yaml").is_file()
        what = "a run folder" if run else "neither a config (FILE.yaml) nor a KEY VALUE pair"
        more = f"; --resume {words[0]} continues it" if run else ""
        raise UserError(f"{words[0]} is {what}{more}")


def check_resume(args: Any) -> None:
    """Refuse `--resume RUN` beside a config, or of what is no run folder."""
    if args.resume not in (None, *WORDS):
        if args.cfg:
            raise UserError("--resume RUN continues one run, by its own config: leave --cfg out")
        require_run(Path(args.resume), "--resume: ", "")


def follow(args: Any, file: str, load: Callable[..., Any], train: Callable[..., Any]) -> None:
    """Train by a config, or print it, as the arguments say."""
    if args.resume in (None, *WORDS):
        cfg, overrides = load(file, args.opts, args.imports), args.opts
    else:
        from mdistiller.run_folder.folder import config_to_resume

        cfg, overrides = config_to_resume(Path(args.resume), args.opts, args.imports, load), ()
    if args.print_config:
        from mdistiller.engine.cfg import show_cfg

        show_cfg(cfg)
    else:
        train(cfg, overrides, **_how(args))


def _how(args: Any) -> dict[str, Any]:
    resume: bool | Literal["auto"] = "auto" if args.resume == "auto" else bool(args.resume)
    return {"resume": resume, "allow_changes": args.allow_changes}


def train_all(configs: list[Any], args: Any) -> int:
    """Train several configs in lock-step; the exit code is that of the first run that failed."""
    from mdistiller.run.train import train_together
    from mdistiller.run_folder.naming import experiment_name

    outcomes = train_together(configs, args.opts, **_how(args))
    code = 0
    for cfg, outcome in zip(configs, outcomes, strict=True):
        if outcome.error is not None:
            how = "stopped" if isinstance(outcome.error, KeyboardInterrupt) else "failed"
            print(f"{experiment_name(cfg, args.opts)} {how}:", file=sys.stderr, flush=True)
            try:
                failed = guarded(outcome.reraise)
            except Exception:  # the other failures are told as well
                traceback.print_exc()
                failed = FAILED
            code = code or failed
    return code
