"""pairs: which method runs on which teacher-student pair, as a table.

Tried is one training step, and before it one of each initialisation stage that the method has.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from mdistiller.cli._probe import random_step, untrained
from mdistiller.cli._run import guarded
from mdistiller.registry import UserError

TEACHERS = ["resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13"]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="pairs", description=__doc__)
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, metavar="NAME")
    parser.add_argument("--students", nargs="+", metavar="NAME", help="default: the CIFAR zoo")
    parser.add_argument("--methods", nargs="+", metavar="TYPE", help="default: all")
    return parser


def one_step(method: str, teacher: str, student: str) -> str:
    """Try a step of every stage on random 32x32 images: "ok", or why it does not work."""
    from mdistiller.engine.init_stage import running

    try:
        distiller = untrained(method, teacher, student, 200, ["CRD.NCE.K", 32])
        finite = []
        for stage in distiller.init_stages():
            with running(distiller, stage):
                finite.append(finite_step(distiller))
        finite.append(finite_step(distiller))
    except UserError as error:
        return str(error)
    return "ok" if all(finite) else "not finite"


def finite_step(distiller: Any) -> bool:
    """Whether losses and gradients of a step of the present stage are finite."""
    import torch

    total = torch.stack(list(random_step(distiller, 4).values())).sum()
    total.backward()
    gradients = [p.grad.sum().item() for p in distiller.parameters() if p.grad is not None]
    return math.isfinite(total.item()) and all(map(math.isfinite, gradients))


def rows(teachers: list[str], students: list[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """One dict a pair: its name, and a verdict by method."""
    for teacher in teachers:
        for student in students:
            verdicts = {method: one_step(method, teacher, student) for method in methods}
            yield {"pair": f"{teacher} -> {student}", **verdicts}


def table(args: argparse.Namespace) -> None:
    """Print the table row by row, then each refusal's reason once."""
    from mdistiller.distillers import distiller_dict
    from mdistiller.models import cifar_model_dict

    for name in [*args.teachers, *(args.students or [])]:
        cifar_model_dict[name]
    methods = args.methods or [name for name in sorted(distiller_dict) if name != "NONE"]
    students = args.students or list(cifar_model_dict)
    print("| pair | " + " | ".join(methods) + " |\n|---" + "|---" * len(methods) + "|")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows(args.teachers, students, methods):
        cells = []
        for method in methods:
            verdict = row[method]
            cells.append("ok" if verdict == "ok" else "refused")
            if verdict != "ok":
                reasons.setdefault((method, verdict), []).append(row["pair"])
        print(f"| {row['pair']} | " + " | ".join(cells) + " |", flush=True)
    for (method, reason), pairs in reasons.items():
        print(f"\n{method}, {len(pairs)} pairs ({pairs[0]}, ...): {reason}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded(lambda: table(args))
