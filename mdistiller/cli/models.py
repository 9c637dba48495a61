"""models: what networks there are, with parameters, operations and the shapes of their stages.

Names may also be timm/NAME and torchvision/NAME, or patterns of such: 'timm/convnext_*'.
"""

from __future__ import annotations

import argparse
import fnmatch
from typing import Any

from tqdm import tqdm

from mdistiller.cli.support.command import command_line
from mdistiller.config.early import check_names
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError, first_line

SIZES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}
CLASSES = {"cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}
WILD = set("*?[")
COLUMNS = ["network", "parameters", "MFLOPs", "stem", "stages", "embedding"]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="models", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or patterns like 'wrn*' (default all)")
    parser.add_argument("--zoo", choices=SIZES, default="cifar")
    parser.add_argument("--size", type=int, help="side of the images (default: the zoo's)")
    parser.add_argument("--classes", type=int, help="number of classes (default: the zoo's)")
    return parser


def facts(name: str, zoo: str, size: int, classes: int) -> dict[str, Any]:
    """Parameters, operations and shapes of a network, for one image.

    The stem's shape is None for a network whose features begin with the first stage.
    """
    from mdistiller.models import count_cost, get_model_entry
    from mdistiller.networks.make import make_network

    net = make_network(get_model_entry(name, zoo), classes, (size, size), {}, "").eval()
    try:
        parameters, flops, features = count_cost(net, (size, size))
    except (RuntimeError, ValueError) as error:
        first = first_line(error)
        raise UserError(f"{name} cannot take {size}x{size} images: {first}") from error
    shapes = [tuple(feature.shape[1:]) for feature in features["feats"]]
    stages = len(getattr(net, "stages", shapes[1:]))
    return {
        "name": name,
        "parameters": parameters,
        "flops": flops,
        "stem": shapes[0] if len(shapes) > stages else None,
        "stages": shapes[-stages:],
        "embedding": features["pooled_feat"][0].numel(),
    }


def chosen(patterns: list[str], zoo: str) -> list[str]:
    """The names that match; a name without wildcards is looked up as it is."""
    from mdistiller.models import get_model_entry, library_names, zoo_names

    names: list[str] = []
    for pattern in patterns or ["*"]:
        if not set(pattern) & WILD:
            get_model_entry(pattern, zoo)
            names.append(pattern)
            continue
        library, slash, _ = pattern.partition("/")
        available = library_names(library) if slash else zoo_names(zoo)
        matching = fnmatch.filter(available, pattern)
        if not matching:
            owner = library if slash else f"the {zoo} zoo"
            raise UserError(f"no network of {owner} matches {pattern!r}")
        names += matching
    return list(dict.fromkeys(names))


def show(args: argparse.Namespace) -> None:
    """Print a line a network; one that a pattern chose may be refused in its line."""
    size = SIZES[args.zoo] if args.size is None else args.size
    classes = CLASSES[args.zoo] if args.classes is None else args.classes
    if size < 1 or classes < 1:
        raise UserError("--size and --classes must be at least 1")
    check_names([name for name in args.names if not set(name) & WILD], args.zoo)
    names = chosen(args.names, args.zoo)
    print(f"one {size}x{size} image, {classes} classes\n")
    rows: list[list[object]] = []
    for name in tqdm(names, disable=None):
        try:
            row = facts(name, args.zoo, size, classes)
        except UserError as error:
            if name in args.names:
                raise
            rows.append([name, f"refused: {error}", *[""] * (len(COLUMNS) - 2)])
            continue
        stem, *stages = (by(shape) for shape in (row["stem"], *row["stages"]))
        counts = f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}"
        rows.append([name, *counts, stem, " ".join(stages), row["embedding"]])
    print(markdown_table(COLUMNS, rows))


def by(shape: tuple[int, ...] | None) -> str:
    """A shape in the form 16x32x32."""
    return "none" if shape is None else "x".join(map(str, shape))


main = command_line(parser, show)
