"""Detectors of run folders, for the commands that look at them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.registry import UserError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from mdistiller.detection.detector import Detector


def picture(args: argparse.Namespace, count: int) -> Figure:
    """The picture of `visualize detections RUN ...`."""
    from mdistiller.detection.config import load_config
    from mdistiller.detection.data import build_set
    from mdistiller.detection.pictures import detections_picture
    from mdistiller.engine.analysis.samples import choose_classes
    from mdistiller.runtime import resolve_device

    folders = [Path(path) for path in args.ckpt]
    while args.opts and Path(args.opts[0]).exists():
        folders.append(Path(args.opts.pop(0)))
    if not folders:
        missing = f"there is no run folder {args.opts[0]}; " if args.opts else ""
        raise UserError(f"{missing}name run folders of tools/train_detection.py (see --help)")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold must be in 0..1, got {args.threshold}")
    configs = [load_config(_config_of(folder), args.opts, args.imports) for folder in folders]
    first = configs[0]
    device, data = resolve_device(first.DEVICE), build_set(first, "VAL")
    networks = []
    taught = _teacher(args, first, data.num_classes, device)
    networks += [("teacher", taught)] if taught else []
    for folder, cfg in zip(folders, configs, strict=True):
        for name in args.checkpoint or ["latest"]:
            net = of_run(folder, name, cfg, data.num_classes).to(device)
            networks.append((f"{'/'.join(folder.resolve().parts[-2:])} {name}", net))
    chosen = [name.strip() for name in args.classes.split(",") if name.strip()]
    labels = choose_classes(data.class_names, chosen, 0)
    node = first.DETECTION.DATA
    size = (node.TEST_MIN_SIZE, node.MAX_SIZE)
    return detections_picture(
        networks, data, size, device, labels, count, args.threshold, args.seed
    )


def _config_of(folder: Path) -> Path:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    return path


def of_run(folder: Path, checkpoint: str, cfg: Any, num_classes: int) -> Detector:
    """The student of a checkpoint of a run folder.

    Args:
        checkpoint: latest, best or epoch_N.
        cfg: the run's.

    Raises:
        UserError: there is no such checkpoint, or it is for other classes.
    """
    from mdistiller.detection.models import build_detector
    from mdistiller.engine.run_folder import checkpoint_file

    node = cfg.DETECTION.STUDENT.clone()
    node.defrost()
    node.WEIGHTS, node.NEW_HEAD = str(checkpoint_file(folder, checkpoint)), False
    return build_detector(node, num_classes)


def _teacher(
    args: argparse.Namespace, cfg: Any, num_classes: int, device: torch.device
) -> Detector | None:
    """That of --teacher, or of the first run if it had one."""
    from mdistiller.detection.config import load_config
    from mdistiller.detection.models import build_detector

    if args.teacher:
        folder = Path(args.teacher)
        own = load_config(_config_of(folder), args.opts, args.imports)
        return of_run(folder, "latest", own, num_classes).to(device)
    if cfg.DISTILLER.TYPE == "NONE":
        return None
    return build_detector(cfg.DETECTION.TEACHER, num_classes, "DETECTION.TEACHER").to(device)
