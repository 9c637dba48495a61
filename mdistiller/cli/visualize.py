"""visualize: pictures of what networks have learned, as PNG or SVG.

visualize tsne RUN --out tsne.png          embeddings in two dimensions
visualize correlation RUN --out c.svg      of logits, minus the teacher's
visualize attention RUN --out a.png        where each stage is active
visualize detections RUN --out d.png       of detectors, beside truth and teacher

The teacher of a run folder is its own; --teacher RUN|NAME names another, --teacher none omits it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.cli.support.command import command_line
from mdistiller.cli.support.networks import add_networks, find_paths, load_networks
from mdistiller.cli.support.teachers import check_teachers, distinct
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = {"tsne": 1000, "correlation": 0, "attention": 5}
"""What can be drawn of classifiers, and of how many images by default; 0: all."""
COUNTS = {**PICTURES, "detections": 4}
"""The same with the picture of detectors."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", choices=COUNTS)
    add_networks(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="FILE.png or .svg")
    parser.add_argument(
        "--classes", default="", metavar="A,B,...", help="names or numbers of classes to show"
    )
    defaults = ", ".join(f"{name} {count or 'all'}" for name, count in COUNTS.items())
    parser.add_argument(
        "--samples", type=int, metavar="N", help=f"number of test images (default: {defaults})"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="detections: score from which on one is shown"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images, and of t-SNE")
    return parser


def picture(words: Sequence[str]) -> Figure:
    """The figure that a command line without --out asks for: for notebooks."""
    return _picture(parser().parse_intermixed_args(words))


def _picture(args: argparse.Namespace) -> Figure:
    count = COUNTS[args.picture] if args.samples is None else args.samples
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")
    if args.picture == "detections":
        from mdistiller.cli.support import detectors

        return detectors.picture(args, count)
    given = load_networks(args, ["latest"])
    from mdistiller.console import print_log
    from mdistiller.evaluation import pictures
    from mdistiller.evaluation.evaluate import evaluate

    teachers = distinct(given.teachers)
    if given.recorded:
        loader, classes = given.test.loader, given.test.num_classes
        evaluations = evaluate(given.subjects, loader, classes, given.device, given.teachers)
        check_teachers(evaluations, given.subjects, given.recorded)
    if len(teachers) > 1:
        names = " and ".join(one.source.label for one in teachers[:2])
        print_log(f"several teachers ({names}), none is shown: name one by --teacher")
    figure: Figure = getattr(pictures, f"{args.picture}_picture")(
        given.subjects,
        given.test,
        given.device,
        teachers[0] if len(teachers) == 1 else None,
        classes=[name.strip() for name in args.classes.split(",") if name.strip()],
        count=count,
        seed=args.seed,
    )
    return figure


def visualize(args: argparse.Namespace) -> None:
    """Load, draw, write one file."""
    if args.out is None:
        raise UserError("name the file for the picture by --out FILE.png or FILE.svg")
    if args.picture in PICTURES:
        find_paths(args)
    from mdistiller.evaluation import draw

    draw.check_out(args.out)
    draw.save(_picture(args), args.out)
    print(args.out)


main = command_line(parser, visualize)
