"""The lines that a run begins with: data, networks, method, device, steps, folder, curves."""

from __future__ import annotations

import importlib.util
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.config.safe_yaml import shown
from mdistiller.config.tasks import task_of
from mdistiller.config.values import flatten, lookup
from mdistiller.console import coloured, width
from mdistiller.dataset import Data
from mdistiller.dataset.build import TEST_SET
from mdistiller.distributed import world_size
from mdistiller.engine.cfg import Config, method_nodes
from mdistiller.engine.hooks import Trainer
from mdistiller.run_folder.record import describe_device

_INDENT = 10


def overview(cfg: Config, trainer: Trainer, about: Mapping[str, str], folder: Path) -> str:
    """The lines, each a title and a text of at most as many columns as :func:`width`.

    Args:
        about: further lines of the task, by title, which come first: "data", ...
    """
    if cfg.DISTILLER.TYPE == "NONE":
        rows = {**about, "method": "none: plain training"}
    else:
        rows = {**about, "method": _method(cfg)}
    rows |= {"device": _device(cfg, trainer.device), "steps": _steps(cfg, trainer)}
    curves = f"tensorboard --logdir {shlex.quote(str(folder))}"
    if importlib.util.find_spec("tensorboard") is None:
        curves = f"pip install tensorboard; {curves}"
    rows |= {"folder": str(folder), "curves": curves}
    return "\n".join(_row(title, text) for title, text in rows.items())


def _row(title: str, text: str) -> str:
    lines = textwrap.wrap(
        text, width() - _INDENT, break_long_words=False, break_on_hyphens=False
    ) or [""]
    head = coloured(f"{title:<{_INDENT}}", "INFO")
    return "\n".join([head + lines[0], *(" " * _INDENT + line for line in lines[1:])])


def describe_data(cfg: Config, data: Data) -> str:
    """Images, classes, the smallest class, and what is left out."""
    size = " x ".join(map(str, data.image_size))
    text = f"{cfg.DATASET.TYPE}: {data.num_data:,} images of {size}"
    if not data.num_classes:
        return f"{text}, without labels; the best epoch is chosen on the {data.val_name}"
    assert data.val is not None
    text += f", {data.num_classes:,} classes"
    images = getattr(data.train, "dataset", None)
    targets = getattr(images, "targets", None)
    if isinstance(targets, torch.Tensor) and not targets.is_floating_point() and len(targets):
        counts = torch.bincount(targets.cpu(), minlength=data.num_classes)
        fewest = int(counts.argmin())
        text += f" (fewest: {int(counts[fewest]):,} of {shown(data.classes[fewest])[1:-1]})"
    held_out = data.val_name != TEST_SET
    test = data.test if held_out else data.val
    text += f", {len(test.dataset):,} test images" if test is not None else ", no test images"
    left_out = [f"{len(data.val.dataset):,} held out to select the best epoch"] if held_out else []
    left_out += getattr(images, "left_out", ())
    if cfg.DATASET.DROP_LAST and data.num_data % cfg.SOLVER.BATCH_SIZE:
        left_out.append("the last batch of each epoch (DROP_LAST)")
    return text + (f"; left out: {', '.join(left_out)}" if left_out else "")


def describe_network(name: str, net: nn.Module, accuracy: str = "", origin: Any = "") -> str:
    """A network in words: its size, what it scores, and where its weights come from.

    Parameters that SOLVER.FREEZE names are counted apart.
    """
    count = sum(p.numel() for p in net.parameters())
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    size = f"{count / 1e6:.2f} M parameters"
    size += f" ({frozen / 1e6:.2f} M frozen)" if 0 < frozen < count else ""
    parts = [name, size, accuracy, str(origin) and f"from {origin}"]
    return ", ".join(filter(None, parts))


def _method(cfg: Config) -> str:
    """The method with its settings, in one line."""
    task = task_of(cfg)
    where = cfg if task is None else {**cfg, **cfg[task.section]}
    nodes = {name: where[name] for name in method_nodes(cfg) if name in where}
    settings = [
        f"{f'{name}.{key}' if len(nodes) > 1 else key} {lookup(node, key)}"
        for name, node in nodes.items()
        for key in flatten(node)
    ]
    method = f"{cfg.DISTILLER.TYPE} with LSKD" if cfg.LSKD.ENABLE else cfg.DISTILLER.TYPE
    line = f"{method}: {', '.join(settings)}" if settings else method
    return textwrap.shorten(line, width() - _INDENT, placeholder=" ...")


def _device(cfg: Config, device: torch.device) -> str:
    count, threads = world_size(), torch.get_num_threads()
    parts = [describe_device(device), "fp32" if cfg.SOLVER.AMP == "none" else cfg.SOLVER.AMP]
    parts += [f"{count} processes"] if count > 1 else []
    parts += [f"{threads} thread{'s' * (threads > 1)}"] if device.type == "cpu" else []
    return ", ".join(parts)


def _steps(cfg: Config, trainer: Trainer) -> str:
    """Epochs, steps and how the weights are moved."""
    solver, steps = cfg.SOLVER, -(-len(trainer.train_loader) // trainer.accumulate)
    images = solver.BATCH_SIZE * trainer.accumulate * world_size()
    usual = solver.TRAINER in ("base", "crd") or task_of(cfg) is not None
    others = "" if usual else f", trainer {solver.TRAINER}"
    return (
        f"{trainer.epochs} epoch{'s' * (trainer.epochs > 1)} x {steps:,} step{'s' * (steps > 1)} "
        f"of {images:,} images; {solver.TYPE}, "
        f"lr {solver.LR:g}, {solver.SCHEDULE}{others}"
    )
