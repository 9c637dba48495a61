"""eval_detection: average precision of detectors on the validation set of a config.

eval_detection -c RUN [-c RUN ...]         the students of run folders, on the first one's data
eval_detection --cfg FILE -c CHECKPOINT    a file with the weights of the config's student
eval_detection --cfg FILE --teacher        the config's teacher

Under torchrun the processes share the images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.cli.support.command import add_overrides, command_line
from mdistiller.cli.support.detection_tables import Subject, json_text, tables
from mdistiller.config.early import check_early
from mdistiller.config.files import require_path
from mdistiller.registry import UserError

if TYPE_CHECKING:
    import torch

    from mdistiller.detection.batches import ValBatches
    from mdistiller.detection.networks.detector import Detector
    from mdistiller.engine.cfg import Config


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="eval_detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cfg", default="", metavar="FILE", help="config of the data (default: that of a run)"
    )
    parser.add_argument(
        "-c",
        "--ckpt",
        action="append",
        default=[],
        metavar="RUN|FILE",
        help="run folder, or file of a run or of a student of --cfg; may be repeated",
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="of run folders: best (default), ..."
    )
    parser.add_argument(
        "--teacher", action="store_true", help="the teacher of the config, or of the first run"
    )
    parser.add_argument("--boxes", action="store_true", help="of Mask R-CNN only the boxes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and curves")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="write what is found, in COCO's result format"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw what is found in some images"
    )
    add_overrides(parser)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Load, measure one network after the other, print the tables, write the files."""
    for path in args.ckpt:
        require_path(path)
    if not args.ckpt and not args.cfg:
        raise UserError("name run folders by -c, or a config by --cfg (see --help)")
    check_early(args.cfg, args.opts, args.imports, "train_detection")
    from mdistiller.cli.support.tables import check_places
    from mdistiller.detection.data import val_loader
    from mdistiller.distributed import is_main_process, process_group
    from mdistiller.evaluation.draw import new_figure
    from mdistiller.runtime import resolve_device

    if args.pictures:
        new_figure(1, 1)  # says what is missing
        args.pictures.mkdir(parents=True, exist_ok=True)
    picture = args.pictures / "detections.png" if args.pictures else None
    check_places([path for path in (args.json, args.results, picture) if path])
    cfg, subjects = name_subjects(args)
    if args.results and len(subjects) > 1:
        raise UserError("--results is a file of one network; name one by -c, or --teacher")
    device = resolve_device(cfg.DEVICE)
    with process_group(device, cfg.SOLVER.RANK_TIMEOUT):
        masks = not args.boxes and any(
            one.node.MASK or one.node.ARCH.startswith("maskrcnn") for one in subjects
        )
        loader = val_loader(cfg, device, masks)
        nets = [(s, _measure(s, loader, device, cfg, args.results)) for s in subjects]
        if not is_main_process():
            return
        print(f"\n{tables(subjects)}")
        if args.json:
            args.json.write_text(json_text(cfg, loader, subjects))
        if picture:
            _draw(nets, loader, device, picture)


def name_subjects(args: argparse.Namespace) -> tuple[Config, list[Subject]]:
    """The config of the data, and the networks that the arguments name."""
    from mdistiller.detection.config import load_config
    from mdistiller.run_folder.folder import checkpoint_file, recorded_config

    given = load_config(args.cfg, args.opts, args.imports) if args.cfg else None
    subjects = []
    for path in map(Path, args.ckpt):
        folder = path if path.is_dir() else path.parent
        recorded = folder / "config.yaml"
        if recorded.is_file():
            cfg = recorded_config(folder, args.opts, args.imports, load_config)
            file = checkpoint_file(path, args.checkpoint) if path.is_dir() else path
            label = f"{'/'.join(folder.resolve().parts[-2:])} {file.name.replace('student_', '')}"
        elif path.is_dir():
            raise UserError(f"{path} is not a run folder: it has no config.yaml")
        elif given is None:
            raise UserError(f"name the config of {path}, which is of no run folder, by --cfg")
        else:
            cfg, file, label = given, path, str(path)
        given = given or cfg
        subjects.append(Subject(label, _with(cfg.DETECTION.STUDENT, str(file))))
    assert given is not None  # of a run or of --cfg
    if args.teacher:
        node = given.DETECTION.TEACHER
        if not node.WEIGHTS:
            raise UserError("--teacher: DETECTION.TEACHER.WEIGHTS names no file")
        subjects.append(Subject("teacher", _with(node, node.WEIGHTS), "DETECTION.TEACHER"))
    if not subjects:
        raise UserError("name weights by -c, or --teacher for the config's teacher (see --help)")
    return given, subjects


def _with(node: Config, weights: str) -> Config:
    student = node.clone()
    student.defrost()
    student.WEIGHTS, student.NEW_HEAD = weights, False
    return student


def _measure(
    subject: Subject, loader: ValBatches, device: torch.device, cfg: Config, results: Path | None
) -> Detector:
    """Fill in what is found of a network, which is returned."""
    from mdistiller.console import print_log
    from mdistiller.detection.coco.evaluate import CocoEvaluator, detect_all, makes_masks
    from mdistiller.detection.networks.models import build_detector
    from mdistiller.distributed import is_main_process

    data = loader.dataset
    net = build_detector(subject.node, data.num_classes, subject.where, data.class_names)
    net.to(device)
    subject.parameters = sum(p.numel() for p in net.parameters())
    masks = makes_masks(net, loader.dataset)
    evaluator = CocoEvaluator(loader.dataset, masks, cfg.DETECTION.EVALUATOR)
    start = time.perf_counter()
    detect_all(net, loader, device, evaluator)
    subject.seconds = (time.perf_counter() - start) / max(1, loader.stop - loader.start)
    subject.numbers = evaluator.summarize()
    subject.curves = evaluator.curves
    if results:
        gathered = evaluator.gather()
        if is_main_process():
            evaluator.save(results, gathered)
    if is_main_process():
        masks_too = f"  mask AP {subject.numbers['segm/AP']:.2f}" if masks else ""
        text = (
            f"{subject.label} ({len(loader.dataset)} images): AP {subject.numbers['bbox/AP']:.2f}"
        )
        text += (
            f"  AP50 {subject.numbers['bbox/AP50']:.2f}{masks_too}  {subject.seconds:.3f} s/image"
        )
        print_log(text, "EVAL")
    return net


def _draw(
    nets: Sequence[tuple[Subject, Detector]], loader: ValBatches, device: torch.device, path: Path
) -> None:
    from mdistiller.detection.visualize import draw_detections
    from mdistiller.evaluation.draw import save

    titled = [(subject.label, net) for subject, net in nets]
    size = (loader.min_size, loader.max_size)
    save(draw_detections(titled, loader.dataset, size, device), path)
    print(f"wrote {path}")


main = command_line(parser, evaluate)
