"""pairs: which method runs on which teacher-student pair, as a table.

Tried is one training step, and before it one of each initialisation stage that the method has.
Networks of timm and torchvision are named as in a config: timm/NAME, torchvision/NAME.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from mdistiller.cli.support.command import command_line
from mdistiller.cli.support.probe import CIFAR, random_step, untrained
from mdistiller.config.early import check_names
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError

BATCH = 4
TEACHERS = ["resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13"]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="pairs", description=__doc__)
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, metavar="NAME")
    parser.add_argument("--students", nargs="+", metavar="NAME", help="default: all of the zoo")
    parser.add_argument("--methods", nargs="+", metavar="TYPE", help="default: all")
    zoo, (side, _), classes = CIFAR
    parser.add_argument("--zoo", default=zoo, help="cifar, tiny_imagenet or imagenet")
    parser.add_argument("--image-size", type=int, default=side, metavar="PIXELS")
    parser.add_argument("--classes", type=int, default=classes)
    return parser


def one_step(
    method: str, teacher: str, student: str, data: tuple[str, tuple[int, int], int] = CIFAR
) -> str:
    """Try a step of every stage on random images: "ok", or why it does not work."""
    from mdistiller.engine.stages import running

    try:
        distiller = untrained(method, teacher, student, 200, ["CRD.NCE.K", 32], data)
        finite = []
        for stage in distiller.init_stages():
            with running(distiller, stage):
                finite.append(finite_step(distiller, data[1]))
        finite.append(finite_step(distiller, data[1]))
    except UserError as error:
        return str(error)
    return "ok" if all(finite) else "not finite"


def finite_step(distiller: Any, size: tuple[int, int]) -> bool:
    """Whether losses and gradients of a step of the present stage are finite."""
    import torch

    total = torch.stack(list(random_step(distiller, BATCH, size=size).values())).sum()
    total.backward()
    gradients = [p.grad.sum().item() for p in distiller.parameters() if p.grad is not None]
    return math.isfinite(total.item()) and all(map(math.isfinite, gradients))


def rows(
    teachers: list[str],
    students: list[str],
    methods: list[str],
    data: tuple[str, tuple[int, int], int] = CIFAR,
) -> Iterator[dict[str, Any]]:
    """One dict a pair: its name, and a verdict by method."""
    for teacher in teachers:
        for student in students:
            verdicts = {method: one_step(method, teacher, student, data) for method in methods}
            yield {"pair": f"{teacher} -> {student}", **verdicts}


def table(args: argparse.Namespace) -> None:
    """Print the table, then each refusal's reason once."""
    side = args.image_size
    if side < 1 or args.classes < BATCH:
        raise UserError(f"--image-size must be at least 1, --classes at least {BATCH}")
    check_names([*args.teachers, *(args.students or [])], args.zoo, args.methods or [])
    from mdistiller.distillers import distiller_dict, get_distiller
    from mdistiller.models import get_model_entry, zoo_names

    students = args.students or zoo_names(args.zoo)
    methods = args.methods or [name for name in sorted(distiller_dict) if name != "NONE"]
    for name in [*args.teachers, *students]:
        get_model_entry(name, args.zoo)
    for name in methods:
        get_distiller(name)
    print(f"one step of {BATCH} random {side}x{side} images of {args.classes} classes; {using()}\n")
    reasons: dict[str, list[tuple[str, str]]] = {}
    data = (args.zoo, (side, side), args.classes)
    lines = []
    count = len(args.teachers) * len(students)
    for row in tqdm(rows(args.teachers, students, methods, data), total=count, disable=None):
        cells = [row["pair"]]
        for method in methods:
            verdict = row[method]
            cells.append("ok" if verdict == "ok" else "refused")
            if verdict != "ok":
                reasons.setdefault(verdict, []).append((method, row["pair"]))
        lines.append(cells)
    print(markdown_table(["pair", *methods], lines))
    for reason, cases in reasons.items():
        refusing, pairs = (list(dict.fromkeys(names)) for names in zip(*cases, strict=True))
        number = f"{len(pairs)} pairs ({pairs[0]}, ...)" if len(pairs) > 1 else pairs[0]
        print(f"\n{', '.join(refusing)}, {number}: {reason}")


def using() -> str:
    """Versions of the libraries that networks come from."""
    from importlib import metadata

    packages = [p for p in ("torch", "torchvision", "timm") if find_spec(p)]
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


main = command_line(parser, table)
