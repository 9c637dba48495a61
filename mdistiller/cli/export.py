"""export: a trained student as safetensors, ONNX and torch.export, with a model card.

export output/PROJECT/NAME                       the best student of a run
export -m MODEL -c FILE -d DATASET --out DIR     a checkpoint without the record of its run
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.cli.models import SIZES
from mdistiller.cli.support.command import add_overrides, command_line
from mdistiller.config.early import check_early
from mdistiller.config.files import require_run
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.export import Exported, Latency, Student
    from mdistiller.export.quantize import Int8

BATCHES = (1, 64)
SECONDS = 2.0  # of measurement for each batch size, spread over what is measured
FEWEST, MOST = 5, 50  # rounds


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: RUN/export)")
    add_formats(parser)
    add_int8(parser)
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument("--no-latency", action="store_true", help="measure no times for the card")
    add_overrides(parser)
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the student."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        help="of a run: best (default), latest, epoch_N, ema_best or ema_latest",
    )
    parser.add_argument("-m", "--model", help="without a run: name in the model zoo")
    parser.add_argument(
        "-c",
        "--ckpt",
        default="pretrain",
        help="with -m: file with the weights; default: the released ones under download_ckpts/",
    )
    parser.add_argument("-d", "--dataset", default="", help="with -m: data it was trained on")
    parser.add_argument(
        "--cfg", default="", metavar="FILE", help="with -m: config with DATASET and STUDENT_ARGS"
    )
    parser.add_argument(
        "--num-classes", type=int, help="with -m: spares reading the data set to learn it"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side in pixels (default: what the file records, else the zoo's)",
    )


def add_formats(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which files, and what they hold."""
    parser.add_argument(
        "--formats", nargs="+", default=["safetensors", "onnx", "torch"], metavar="FORMAT"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--with-normalization",
        dest="normalization",
        action="store_true",
        default=True,
        help="ONNX and torch.export files take values from 0 to 1 (default)",
    )
    group.add_argument(
        "--without-normalization",
        dest="normalization",
        action="store_false",
        help="they take normalised images",
    )
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="instead: backbone.pth, the weights without classifier under the names of timm or "
        "torchvision",
    )
    parser.add_argument(
        "--opset", type=int, metavar="N", help="of the ONNX file (default: torch's usual one)"
    )
    parser.add_argument(
        "--dynamic-batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ONNX for any batch size (default), or for one image at a time",
    )


def add_int8(parser: argparse.ArgumentParser) -> None:
    """The arguments of quantisation."""
    parser.add_argument(
        "--int8",
        action="store_true",
        help="of a run: student_int8.onnx, too, and a table of size, accuracy and time of both",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=512,
        metavar="N",
        help="with --int8: training images that give the ranges of activations (default: 512)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="with --int8: top-1 accuracy that may be lost, else no int8 file is written "
        "(default: 1.0)",
    )


def find_student(args: argparse.Namespace) -> Student:
    """The student of the run or file that the arguments name."""
    if not args.model:
        if not args.opts:
            raise UserError("name a run folder, or a network and a checkpoint by -m and -c")
        folder, *overrides = args.opts
        given = [f"--{name}" for name in _WITHOUT_RUN if getattr(args, name.replace("-", "_"))]
        if given:
            raise UserError(f"{given[0]} goes with -m; {folder} states its network and data")
        require_run(Path(folder))
        from mdistiller.export import from_run

        return from_run(Path(folder), args.checkpoint, overrides, args.imports)
    if not args.out:
        raise UserError("-m needs --out, the folder for the files")
    named = bool(args.dataset or args.cfg or "DATASET.TYPE" in args.opts[::2])
    dataset = ["DATASET.TYPE", args.dataset] if args.dataset else []
    check_early(args.cfg, [*dataset, *args.opts], args.imports)
    from mdistiller.dataset import data_spec
    from mdistiller.engine.cfg import load_config
    from mdistiller.export import from_checkpoint, recorded_side

    cfg = load_config(args.cfg, [*dataset, *args.opts], args.imports)
    if args.num_classes is None and not named:
        raise UserError("-m needs -d, the data set it was trained on, or --num-classes")
    source = data_spec(cfg)
    side = args.image_size
    if side is None and args.num_classes is not None:
        side = source.side or recorded_side(cfg, args.model, args.ckpt) or SIZES[source.zoo]
    return from_checkpoint(cfg, args.model, args.ckpt, args.num_classes, side or 0, named)


_WITHOUT_RUN = ("dataset", "cfg", "num-classes", "image-size")


def check_int8(args: argparse.Namespace) -> None:
    """Refuse arguments of --int8 that cannot be, before anything is loaded."""
    if args.int8 and args.model:
        raise UserError(
            "--int8 needs a run folder: its training images calibrate the int8 model, its held-out "
            "or test images measure the accuracy"
        )
    if args.int8 and args.backbone:
        raise UserError("--int8 needs the student's logits, and --backbone leaves them out")
    if args.int8 and "onnx" not in args.formats:
        raise UserError("--int8 is made from the ONNX file: add onnx to --formats")
    if args.calibration < 1 or not args.max_drop >= 0:
        raise UserError("--calibration must be at least 1 and --max-drop at least 0")


def export(args: argparse.Namespace) -> None:
    """Write the files, then the card that describes them."""
    check_int8(args)
    student = find_student(args)
    from mdistiller.export import export_backbone, export_student, model_card, write_card
    from mdistiller.export.quantize import INT8_FILE, check_epoch

    if args.int8:
        check_epoch(student)
    out = Path(args.out or Path(args.opts[0]) / "export")
    if args.backbone:
        path, usage = export_backbone(student, out, args.force)
        print(f"{path}: load it by {usage}")
        print(f"images are normalised by mean {list(student.mean)} and std {list(student.std)}")
        return
    if not student.num_classes:
        raise UserError(
            f"{student.name} was trained without labels and has no logits: give --backbone"
        )
    files = export_student(
        student,
        out,
        args.formats,
        normalization=args.normalization,
        force=args.force,
        opset=args.opset,
        dynamic_batch=args.dynamic_batch,
        also=[INT8_FILE] if args.int8 else [],
    )
    for file in files:
        print(f"{file.path}: logits within {file.difference:.1e} of PyTorch's", flush=True)
    int8, refusal = None, None
    try:
        int8 = _quantize(args, student, files) if args.int8 else None
    except UserError as error:
        refusal = error  # the card still describes the other files
    latencies, machine = ([], "") if args.no_latency else measure(student, files)
    write_card(model_card(student, files, latencies, machine, int8), out)
    print(out / "README.md")
    if refusal:
        raise refusal


def _quantize(args: argparse.Namespace, student: Student, files: list[Exported]) -> Int8:
    """Add the ONNX file in 8 bits to the others, and print it beside the original."""
    from mdistiller.export.quantize import quantize_student

    original = next(file for file in files if file.format == "onnx")
    timed = not args.no_latency
    int8 = quantize_student(student, original, args.calibration, args.max_drop, timed)
    files.append(int8.files[1])
    print(f"{int8.files[1].path}\n\n{int8.text()}\n", flush=True)
    return int8


def measure(student: Student, files: list[Exported]) -> tuple[list[Latency], str]:
    """Latencies of the network and of each file that runs by itself, and the machine in words."""
    import torch

    from mdistiller.cli.support.timing import surroundings

    machine = surroundings("cpu")
    words = f"{machine['hardware']} (CPU, threads: {machine['threads']})"
    timings = [row for batch in BATCHES for row in latencies(student, files, batch, "cpu")]
    if torch.cuda.is_available():
        words += f" and {surroundings('cuda')['hardware']} (CUDA)"
        timings += [row for batch in BATCHES for row in latencies(student, [], batch, "cuda")]
    return timings, f"{words}, torch {machine['torch']}"


def latencies(
    student: Student, files: list[Exported], batch: int, device: str
) -> Iterator[Latency]:
    """Of the network and of files, in turns, until SECONDS are over."""
    import torch

    from mdistiller.cli.support.timing import race, seconds
    from mdistiller.export import FORMATS, Latency

    images = torch.rand(batch, student.channels, *student.image_size, device=device)
    net = copy.deepcopy(student.net).to(device)
    steps: dict[str, Callable[[], Any]] = {f"PyTorch, {device.upper()}": lambda: net(images)}
    for file in files:
        if FORMATS[file.format].standalone:
            steps[f"`{file.path.name}`, {device.upper()}"] = partial(file.run, images)
    with torch.no_grad():
        once = sum(seconds(step, device)[0] for step in steps.values())
        rounds = max(FEWEST, min(MOST, int(SECONDS / once)))
        for what, time in race(steps, device, rounds, wall=True).items():
            yield Latency(what, batch, time["ms"], time["low"], time["high"], rounds)


main = command_line(parser, export)
