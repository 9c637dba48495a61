"""convert_detectron2: a detector of detectron2's model zoo as a file for DETECTION.*.WEIGHTS.

Takes Faster and Mask R-CNNs with ResNet and FPN: the zoo's .pkl files, and .pth files of trainings
with detectron2. No code of the file is run. The zoo's detectors take blue first (--input bgr), and
their bottlenecks halve the resolution in the first layer; say otherwise for those that were trained
from torchvision's ResNets. MSRA's R-50.pkl and R-101.pkl become files for BACKBONE_WEIGHTS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdistiller.cli.convert.checkpoint import write
from mdistiller.cli.support.command import command_line
from mdistiller.registry import UserError


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="convert_detectron2", description=__doc__)
    parser.add_argument("file", type=Path, help="of detectron2: .pkl or .pth")
    parser.add_argument("out", type=Path, help="where the converted one goes")
    parser.add_argument(
        "--input", choices=("bgr", "rgb"), default="bgr", help="how images were put to it"
    )
    parser.add_argument(
        "--stride-in-3x3",
        action="store_true",
        help="bottlenecks halve the resolution in their 3x3 layer, as torchvision's",
    )
    return parser


def convert_file(args: argparse.Namespace) -> None:
    """Write the converted weights to a new file, and say how a config uses it."""
    if args.out.exists():
        raise UserError(f"{args.out} is there already; name another file")
    if not args.file.exists():
        raise UserError(f"checkpoint {args.file} does not exist")
    from mdistiller.detection.convert.caffe2 import convert_backbone, is_backbone
    from mdistiller.detection.convert.detectron2 import convert, read
    from mdistiller.detection.convert.weights import FACTS

    arrays = read(args.file)
    if is_backbone(arrays):
        contents = convert_backbone(arrays, args.file)
        settings = "BACKBONE_WEIGHTS, with INPUT bgr STRIDE_IN_1X1 True"
    else:
        contents = convert(arrays, args.file, args.input, not args.stride_in_3x3)
        facts = contents[FACTS]
        settings = " ".join(f"{key.upper()} {facts[key]}" for key in facts if key in _SAID)
        settings = (
            f"WEIGHTS, with {settings}, for {facts['num_classes']} classes, background included"
        )
    write(contents, args.out)
    print(f"{args.out}: {len(contents['model'])} tensors; in a config for {settings}")


_SAID = ("arch", "flavour", "input", "stride_in_1x1", "mask", "channels")


main = command_line(parser, convert_file)
