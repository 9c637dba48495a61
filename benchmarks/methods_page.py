"""The table of methods in docs/methods.md, found out by running every method."""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mdistiller.cli import methods
from mdistiller.cli.support.command import command_line
from mdistiller.cli.support.probe import random_step, untrained
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError

PAIR = ("resnet32x4", "resnet8x4")
COLUMNS = [
    "method",
    "paper",
    "student uses",
    "teacher gives",
    "needs",
    "extra",
    "published",
    "configs",
]
MARK = "<!-- From here on by `python tools/methods.py --write docs/methods.md`. -->\n"


def paper(method: type) -> str:
    """Title, venue and link, from the first paragraph of the docstring of the method's file.

    That is "NAME. Authors: Title, Venue, arXiv NUMBER." or, without a paper, a sentence.
    """
    document = inspect.getdoc(sys.modules[method.__module__]) or ""
    text = " ".join(document.split("\n\n")[0].split())
    cited = text.partition(". ")[2].partition(": ")[2] or text.partition(". ")[2]
    link = r"[arXiv \1](https://arxiv.org/abs/\1)"
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", link, cited.rstrip("."))


def needs(method: type[Any]) -> str:
    """What a method asks for beyond one forward of a frozen teacher and a student."""
    from mdistiller.distillers import Distiller

    asked = {
        name
        for function in (method.__init__, method.forward_train, method.distill)
        for name in inspect.signature(function).parameters
    }
    facts = {
        "no teacher": not method.uses_teacher,
        "two views": method.two_views,
        "sample numbers": "index" in asked,
        "training labels": "targets" in asked,
        "teacher in train mode": not method.teacher_in_eval_mode,
        "more than the student at test time": method.forward_test is not Distiller.forward_test,
    }
    return ", ".join(name for name, holds in facts.items() if holds)


class Watch:
    """Cuts the outputs of a network off from it, and may replace one of them by noise."""

    def __init__(self, net: Any):
        self.forwards = 0
        self.outputs: dict[str, list[Any]] = {}
        self.noisy: str | None = None
        net.register_forward_hook(self)

    def __call__(self, net: Any, inputs: Any, output: Any) -> Any:
        import torch

        self.forwards += 1

        def cut(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [cut(name, item) for item in value]
            if name == self.noisy:
                value = value + torch.randn(value.shape, generator=torch.Generator())
            leaf = value.detach().requires_grad_(torch.is_grad_enabled())
            self.outputs.setdefault(name, []).append(leaf)
            return leaf

        logits, features = output
        return cut("logits", logits), {name: cut(name, x) for name, x in features.items()}


def distilled(distiller: Any) -> Any:
    """What the method adds to the cross-entropy, in a step of the main stage and of those before.

    Stages of cross-entropy alone add nothing.
    """
    from mdistiller.engine.stages import running

    terms: list[Any] = []
    for stage in distiller.init_stages():
        with running(distiller, stage):
            terms += random_step(distiller, 8).values()
    if distiller.distills:
        terms.append(random_step(distiller, 8, epoch=30)["loss_kd"])
    return sum(terms)


def tensors_used(name: str) -> tuple[list[str], list[str], int]:
    """Outputs of the student that get a gradient, and of the teacher that the loss depends on.

    Also how often the student runs in a step.
    """
    import torch

    distiller = untrained(name, "resnet20", "resnet8", 400)
    watch = Watch(distiller.student)
    loss = distilled(distiller)
    student = [
        key
        for key, leaves in watch.outputs.items()
        if any(
            g is not None for g in torch.autograd.grad(loss, leaves, None, True, allow_unused=True)
        )
    ]
    forwards = watch.forwards // (len(distiller.init_stages()) + distiller.distills)
    if distiller.teacher is None:
        return student, [], forwards
    teacher = []
    watch = Watch(distiller.teacher)
    state = copy.deepcopy(distiller.state_dict())
    for key in [None, "logits", "feats", "preact_feats", "final_map", "pooled_feat"]:
        distiller.load_state_dict(state)
        watch.noisy = key
        changed = distilled(distiller).item()
        if key is None:
            loss = changed
        elif changed != loss:
            teacher.append(key)
    return student, teacher, forwards


def extras(name: str, forwards: int) -> str:
    """What a method trains and keeps beside the two networks."""
    from torch import nn

    from mdistiller.models import get_model_entry

    distiller = untrained(name, *PAIR, 50_000)
    trained = sum(p.numel() for p in distiller.extra_parameters())
    networks = [net for net in (distiller.student, distiller.teacher) if net is not None]
    norms = [m for m in distiller.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    other = {id(buffer) for part in [*networks, *norms] for buffer in part.buffers()}
    kept = sum(b.numel() for b in distiller.buffers() if id(b) not in other)
    plain = get_model_entry(PAIR[1], "cifar")(num_classes=100)
    sizes = (sum(p.numel() for p in net.parameters()) for net in (distiller.student, plain))
    grown = next(sizes) - next(sizes)
    parts = [f"{trained:,} parameter{'s' * (trained > 1)}"] if trained else []
    parts += [f"{grown:,} parameters that the student keeps"] if grown > 0 else []
    parts += [f"{kept:,} in buffers"] if kept else []
    parts += [f"{forwards} forwards"] if forwards > 1 else []
    parts += [f"{part.init.epochs} epochs before" for part in distiller.init_stages().values()]
    return ", ".join(parts)


def published(name: str) -> str:
    """What papers report for the usual pair."""
    from mdistiller.report.published import published as lines

    return "; ".join(
        f"{line.top1:.2f} ({line.source if line.method == name else line.method})"
        for line in lines()
        if (line.type, line.teacher, line.student) == (name, *PAIR)
    )


def configs(name: str) -> str:
    """Folders below `configs/` with files for a method, and how many."""
    from mdistiller.config.safe_yaml import parse_yaml
    from mdistiller.runtime import config_root

    counts: dict[str, int] = {}
    for path in sorted(config_root().rglob("*.yaml")):
        settings = (parse_yaml(path.read_text()) or {}).get("DISTILLER") or {}
        if settings.get("TYPE") == name:
            folder = path.parent.relative_to(config_root()).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    return ", ".join(f"`{folder}` ({count})" for folder, count in counts.items())


def row(name: str) -> list[str]:
    """The cells of a method."""
    from mdistiller.distillers import distiller_dict

    method = distiller_dict[name]
    student, teacher, forwards = tensors_used(name)
    return [
        f"`{name}`",
        paper(method),
        ", ".join(student),
        ", ".join(teacher),
        needs(method),
        extras(name, forwards),
        published(name),
        configs(name),
    ]


def table(names: list[str]) -> str:
    """The methods as a Markdown table."""
    return markdown_table(COLUMNS, map(row, names)) + "\n"


def feature_only() -> str:
    """Which methods need no classifier of the teacher."""
    from mdistiller.distillers import distiller_dict

    sizes = sorted(
        f"`{name}`"
        for name, method in distiller_dict.items()
        if method.uses_teacher and not method.needs_teacher_classifier
    )
    return (
        f"For {', '.join(sizes)} and sums of these the teacher's weights may be for other classes, "
        "or have no classifier: they read its features alone.\n"
    )


def write(page: Path) -> None:
    """Make the page's table anew."""
    from mdistiller.distillers import distiller_dict

    text = table(sorted(name for name in distiller_dict if name != "NONE"))
    try:
        head, mark, _ = page.read_text().partition(MARK)
        if not mark:
            raise UserError(f"--write: {page} lacks the line {MARK.strip()}")
        page.write_text(f"{head}{MARK}\n{feature_only()}\n{text}")
    except OSError as error:
        raise UserError(f"--write: {page}: {error.strerror}") from None


def run(args: argparse.Namespace) -> None:
    """Print the stored table, or make the page anew."""
    if args.write is None:
        return methods.methods(args)
    if args.only:
        raise UserError("--write makes the whole page: leave out --only")
    return write(args.write)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = methods.parser()
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page: replace its table")
    return parser


main = command_line(parser, run)
