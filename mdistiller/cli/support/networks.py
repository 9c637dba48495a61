"""Which networks to look at, and on what data: the arguments that eval and visualize share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.cli.support.command import add_overrides
from mdistiller.cli.support.teachers import own_teachers, taught_by
from mdistiller.config.early import check_early
from mdistiller.config.files import require_path
from mdistiller.files.names import EXPORTED, split_key
from mdistiller.registry import UserError

if TYPE_CHECKING:
    import torch

    from mdistiller.dataset import TestData
    from mdistiller.engine.cfg import Config
    from mdistiller.evaluation.subjects import Source, Subject


def add_networks(parser: argparse.ArgumentParser) -> None:
    """The arguments; `KEY VALUE` may have further run folders and files before it."""
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        default=[],
        help="name in the model zoo of the files that -c gives; repeated: of each",
    )
    parser.add_argument(
        "-c",
        "--ckpt",
        action="append",
        default=[],
        metavar="RUN|FILE",
        help="run folder, which needs no -m, or file with the weights; may be repeated. Default: "
        "the released ones under download_ckpts/",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME",
        help="of a run folder: latest, best, epoch_N, ema_latest or ema_best; may be repeated "
        "(default: latest; eval: and best)",
    )
    parser.add_argument("-d", "--dataset", default="", help="data set (default: a run's; cifar100)")
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument(
        "--cfg",
        default="",
        metavar="FILE",
        help="config to take DATASET, STUDENT_ARGS and STUDENT_NORM from (TEACHER_*, too)",
    )
    _add_teacher(parser)
    add_overrides(parser)


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        default="",
        metavar="NAME|RUN|none",
        help="teacher to compare with, or its run (default: the run folders' own)",
    )
    parser.add_argument(
        "--teacher-ckpt",
        default="pretrain",
        metavar="FILE",
        help="its weights; default: the run folders' own if it is theirs, else the released ones. "
        "Of a run: the latest",
    )


@dataclass
class Loaded:
    """Networks in eval mode on the device, and the test set they are looked at on.

    Attributes:
        teachers: what each is compared with.
        recorded: accuracy in percent of a run's own teacher, by run folder, if the data are those
            of the run; it must be the same here (`check_teachers`).
    """

    dataset: str
    test: TestData
    device: torch.device
    subjects: list[Subject]
    teachers: list[Subject | None]
    recorded: dict[Path, float]


def find_paths(args: argparse.Namespace) -> None:
    """Move run folders and files that stand before the overrides to those of -c.

    Raises:
        UserError: one does not exist.
    """
    given = []
    while args.opts and split_key(args.opts[0])[0].exists():
        given.append(args.opts.pop(0))
    args.ckpt += _networks_among(given, bool(args.model)) if len(given) > 1 else given
    first = args.opts[0] if args.opts else ""
    named = "/" in first or (first and not first.partition(".")[0].isupper())  # config keys are
    for path in [*args.ckpt, *([first] if named else [])]:
        if path != "pretrain":
            require_path(split_key(path)[0])


def _networks_among(paths: Sequence[str], named: bool) -> list[str]:
    """Of what a shell made of a pattern, the runs with checkpoints and files with weights; a line
    is printed for each other path.

    Args:
        named: -m names the networks of files that are not in a run folder.

    Raises:
        UserError: none is one.
    """
    found = []
    for path in paths:
        file = split_key(path)[0]
        run = file if file.is_dir() else file.parent
        if file.suffix in EXPORTED and file.is_file():
            why = ""
        elif not (run / "config.yaml").is_file():
            why = "" if named and file.is_file() else "it is not a run folder (no config.yaml)"
        else:
            saved = file.is_file() or (run / "latest").is_file() or any(run.glob("student_*"))
            why = "" if saved else "the run has no checkpoint yet"
        if why:
            print(f"skipped {path}: {why}", file=sys.stderr, flush=True)
        else:
            found.append(path)
    if not found:
        raise UserError(f"none of the {len(paths)} paths is a run folder or a file of weights")
    return found


def _read_config(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """The config that the arguments name, and the overrides in it."""
    find_paths(args)
    dataset = ["DATASET.TYPE", args.dataset] if args.dataset else []
    overrides = [*dataset, "DATASET.TEST.BATCH_SIZE", str(args.batch_size), *args.opts]
    check_early(args.cfg, overrides, args.imports)
    from mdistiller.engine.cfg import load_config

    return load_config(args.cfg, overrides, args.imports), overrides


def load_networks(args: argparse.Namespace, usual: Sequence[str]) -> Loaded:
    """The networks and the data that the arguments name.

    Args:
        usual: checkpoints of a run folder, where --checkpoint names none.
    """
    given, overrides = _read_config(args)
    from mdistiller.evaluation.subjects import data_config, load_all
    from mdistiller.runtime import resolve_device

    sources = _sources(args, args.ckpt, given, usual)
    teacher = _teacher(args, given, sources)
    all_runs = [*sources, *([teacher] if teacher else [])]
    named = args.cfg or args.dataset or "DATASET.TYPE" in args.opts[::2]
    runs = any(source.run for source in all_runs)
    cfg = data_config(all_runs, overrides, args.imports) if runs and not named else given
    device = resolve_device(cfg.DEVICE)
    test, subjects = load_all(all_runs, cfg, device)
    teachers: list[Subject | None]
    recorded: dict[Path, float] = {}
    if teacher is not None:
        shared = subjects.pop()
        teachers = [shared] * len(subjects)
    else:
        teachers, recorded = own_teachers(args.teacher, sources, cfg, test, device)
    if named or any(_decides(key) for key in args.opts[::2]):
        recorded = {}
    return Loaded(cfg.DATASET.TYPE, test, device, subjects, teachers, recorded)


def labelled_networks(args: argparse.Namespace) -> tuple[list[Source], Config, torch.device]:
    """Networks to probe, the runs' own teachers among them, and the config of labelled data."""
    given, _ = _read_config(args)
    from mdistiller.dataset import DATASETS
    from mdistiller.engine.probe import labelled_config
    from mdistiller.evaluation.subjects import run_teachers
    from mdistiller.runtime import resolve_device

    sources = _sources(args, args.ckpt, given, ["latest", "best"])
    teacher = _teacher(args, given, sources)
    cfg = labelled_config(given, args.labelled)
    sources += [teacher] if teacher is not None else []
    if teacher is None and args.teacher != "none":
        taught = taught_by(args.teacher, sources, several=True)
        sources += [one for one, _ in run_teachers(taught, DATASETS[cfg.DATASET.TYPE])]
    return sources, cfg, resolve_device(cfg.DEVICE)


def _decides(key: str) -> bool:
    """Whether a key of the config may decide what accuracy a teacher has."""
    harmless = ("DATASET.LOADER", "DATASET.NUM_WORKERS", "DATASET.WORKER_TIMEOUT", "DATASET.TEST.")
    return key.startswith("DATASET.") and not key.startswith(harmless)


def _sources(
    args: argparse.Namespace, paths: list[str], given: Config, usual: Sequence[str]
) -> list[Source]:
    """Run folders' students, and files of the networks that -m names."""
    from mdistiller.evaluation.subjects import file_source, run_sources

    files = [path for path in paths if not Path(path).is_dir()]
    if not paths:
        if not args.model:
            raise UserError("name run folders or files by -c, or networks by -m (see --help)")
        files = paths = ["pretrain"] * len(args.model)
    if args.model and not files:
        raise UserError("-m goes with a file of weights; a run folder states its network")
    names = args.model * len(files) if len(args.model) < 2 else list(args.model)
    if len(names) not in (0, len(files)):
        raise UserError(
            f"-m names {len(names)} networks for {len(files)} files: give one for all, or one each"
        )
    names = names or [""] * len(files)
    if args.checkpoint and len(files) == len(paths):
        raise UserError("--checkpoint goes with a run folder; a file is named by -c itself")
    found: list[Source] = []
    for path in paths:
        if Path(path).is_dir():
            found += run_sources(Path(path), args.checkpoint or usual, args.imports)
        else:
            found.append(file_source(path, names.pop(0), given, args.imports))
    labels = [one.label for one in found]  # of a run: the last two parts of its path
    return [
        replace(one, label=f"{one.run} {one.label.rpartition(' ')[2]}")
        if one.run and labels.count(one.label) > 1 and one.label != str(one.weights)
        else one
        for one in found
    ]


def _teacher(args: argparse.Namespace, given: Config, sources: Sequence[Source]) -> Source | None:
    """The teacher that the arguments name; None without one, or if it is the runs' own."""
    from mdistiller.evaluation.subjects import file_source, run_sources

    if args.teacher in ("", "none"):
        if args.teacher_ckpt != "pretrain":
            raise UserError("--teacher-ckpt needs --teacher, the network's name")
        return None
    if Path(args.teacher).is_dir():
        if args.teacher_ckpt == "pretrain":
            return run_sources(Path(args.teacher), ["latest"], args.imports)[0]
        raise UserError(f"--teacher {args.teacher} is a run, so --teacher-ckpt says nothing")
    configured = args.cfg or any(key.startswith("DISTILLER.TEACHER_") for key in args.opts[::2])
    configs = [source.cfg for source in taught_by(args.teacher, sources)]
    if configs and not configured:  # with the arguments and the normalisation it taught with
        if args.teacher_ckpt == "pretrain":
            return None
        given = configs[0]
    return file_source(args.teacher_ckpt, args.teacher, given, role="TEACHER")
