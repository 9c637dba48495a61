"""The picture of detectors that `visualize` makes of run folders."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture(args: argparse.Namespace, count: int) -> Figure:
    """The figure of `visualize detections RUN ...`.

    Args:
        count: of images.
    """
    from mdistiller.detection.data import build_set
    from mdistiller.detection.networks.models import build_detector
    from mdistiller.detection.visualize import draw_detections
    from mdistiller.evaluation.samples import choose_classes
    from mdistiller.runtime import resolve_device

    paths = list(args.ckpt)
    while args.opts and Path(args.opts[0]).exists():
        paths.append(args.opts.pop(0))
    if not paths:
        missing = f"there is no run folder {args.opts[0]}; " if args.opts else ""
        raise UserError(f"{missing}name run folders of tools/train_detection.py (see --help)")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold must be in 0..1, got {args.threshold}")

    cfg, runs = _name_runs(args, paths)
    device, data = resolve_device(cfg.DEVICE), build_set(cfg, "VAL")
    networks = []
    for one in runs:
        net = build_detector(one.node, data.num_classes, one.where, data.class_names)
        networks.append((one.label, net.to(device)))
    chosen = [name.strip() for name in args.classes.split(",") if name.strip()]
    labels = choose_classes(data.class_names, chosen, 0)
    size = (cfg.DETECTION.DATA.TEST_MIN_SIZE, cfg.DETECTION.DATA.MAX_SIZE)
    return draw_detections(networks, data, size, device, labels, count, args.threshold, args.seed)


def _name_runs(args: argparse.Namespace, paths: list[str]) -> tuple[Any, list[Any]]:
    """The config of the data, and the detectors: the runs', and first of all their teacher.

    That is the one of --teacher, or of the first run if it had one.
    """
    from mdistiller.cli.eval_detection import name_subjects
    from mdistiller.cli.support.detection_tables import Subject

    def named(ckpt: list[str], checkpoint: str) -> Any:
        asked = {"cfg": args.cfg, "opts": args.opts, "imports": args.imports, "teacher": False}
        return name_subjects(argparse.Namespace(ckpt=ckpt, checkpoint=checkpoint, **asked))

    runs = []
    for name in args.checkpoint or ["latest"]:
        cfg, some = named(paths, name)
        runs += some
    if args.teacher:
        runs.insert(0, replace(named([args.teacher], "latest")[1][0], label="teacher"))
    elif cfg.DISTILLER.TYPE != "NONE" and not cfg.DETECTION.TEACHER.NEW_HEAD:
        runs.insert(0, Subject("teacher", cfg.DETECTION.TEACHER, "DETECTION.TEACHER"))
    return cfg, runs
