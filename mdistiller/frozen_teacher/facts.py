"""Teacher facts: tensors computed once from a frozen teacher and the training images.

A distiller lists such tensors in `teacher_facts`. Each takes one pass over the training images
without augmentation, split over the processes of a run. It is stored in a file beside the teacher's
cached logits, under a hash of everything it depends on: the teacher's weights, the images and their
classes, and the fact's parameters. A resumed run, or another run with the same teacher and data,
reads that file.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import __version__
from mdistiller.config.roles import teacher_configs, teacher_identity, teacher_name
from mdistiller.console import print_log
from mdistiller.dataset import Data
from mdistiller.distillers import Distiller, TeacherTeam
from mdistiller.distillers.helpers.features.shapes import missing_feature, preserve_state
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.teacher_facts import TeacherFact
from mdistiller.distributed import from_main_process, sum_over_ranks
from mdistiller.files.atomic import replacing
from mdistiller.frozen_teacher.fingerprint import digest, image_set_digest, teacher_digest
from mdistiller.frozen_teacher.frozen import is_frozen
from mdistiller.registry import UserError, first_line


def supply_facts(distiller: Distiller, cfg: Any, data: Data, device: torch.device) -> None:
    """Compute or read the facts that each part of a distiller lists; all processes call this.

    Args:
        distiller: on `device`, its teacher loaded and frozen.

    Raises:
        UserError: the teacher is trained, or a class has no images.
    """
    configs = {}
    if isinstance(distiller.teacher, TeacherTeam):
        configs = dict(zip(distiller.teacher.nets, teacher_configs(cfg), strict=True))
    for part in distiller.modules():
        if not isinstance(part, Distiller):
            continue
        for name, fact in part.teacher_facts.items():
            if part.teacher is None or not is_frozen(distiller):
                raise UserError(
                    f"DISTILLER.TYPE {cfg.DISTILLER.TYPE}: {name} depends on a teacher that does "
                    "not change, but this one is in train mode; leave out the method that trains it"
                )
            one = configs.get(part.teacher, cfg)
            part.take_fact(name, _fact(part.teacher, one, data, device, name, fact))


def _fact(
    teacher: nn.Module, cfg: Any, data: Data, device: torch.device, name: str, fact: TeacherFact
) -> Tensor:
    settings = cfg.DISTILLER
    key = _key(cfg, data, teacher, fact)
    folder = Path(settings.TEACHER_CACHE_DIR or Path(cfg.LOG.PREFIX) / "teacher_cache")
    path = folder / f"{digest([key])}.fact.npz"
    kept = from_main_process(lambda: _read(path, key))
    if kept is not None:
        print_log(f"teacher fact {name}: read from {path}")
        return torch.from_numpy(kept).to(device)
    if data.num_classes and fact.by_class:
        chosen = choose_images(data.train.dataset.targets, data.num_classes, fact.per_class)
    else:
        chosen = spread(data.num_data, fact.per_class)[None]
    print_log(f"teacher fact {name}: the teacher runs once on {chosen.numel()} training images")
    outputs = class_outputs(teacher, data, device, fact.output, chosen, fact.positions)
    value = fact.reduce(outputs)
    if not from_main_process(lambda: bool(torch.isfinite(value).all())):
        raise UserError(
            f"DISTILLER.TYPE {settings.TYPE}: {name} is not finite; the teacher "
            f"{teacher_name(cfg)} gives NaN or infinity on training images"
        )
    kept = from_main_process(lambda: _write(path, key, value.cpu().numpy()))
    return torch.from_numpy(kept).to(device)  # the same bits in all processes


def spread(count: int, most: int) -> Tensor:
    """At most `most` positions out of `count`, evenly spread: int64."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def choose_images(targets: Tensor, classes: int, per_class: int) -> Tensor:
    """Positions of the first M images of each class: int64 [C, M].

    Raises:
        UserError: a class has no images.
    """
    targets = targets.cpu()
    counts = targets.bincount(minlength=classes)
    if not counts.min():
        raise UserError(
            f"class {int(counts.argmin())} has no training images, but this method needs some of "
            "each; add them, or choose a setting or method that takes none"
        )
    count = min(int(counts.min()), per_class)
    order = targets.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    return order[starts[:, None] + torch.arange(count)]


@torch.no_grad()
def class_outputs(
    teacher: nn.Module,
    data: Data,
    device: torch.device,
    output: str,
    chosen: Tensor,
    positions: int = 0,
) -> Tensor:
    """A network's outputs for `chosen` images [C, M]: float32 [C, M, D], in all processes.

    The network itself runs, in eval mode and full precision: the fact depends neither on SOLVER.AMP
    nor on folding or fusing.

    Args:
        output: "logits", or the name of a feature.
        positions: as of :class:`TeacherFact`.
    """
    if data.plain is None:
        raise UserError("these data offer no training images without augmentation (Data.plain)")
    place = torch.full((data.num_data,), -1)
    place[chosen.flatten()] = torch.arange(chosen.numel())
    loader = data.plain()
    first = loader.start
    with preserve_state(teacher):
        blank = torch.zeros(1, len(data.mean), *data.image_size, device=device)
        width = _output(teacher, blank, output, positions).shape[1]
        rows = torch.zeros(chosen.numel(), width, device=device)
        for images, _ in loader:
            places = place[first : first + len(images)]
            first += len(images)
            wanted = places >= 0
            if wanted.any():
                made = _output(teacher, images[wanted.to(device)], output, positions)
                rows[places[wanted].to(device)] = made
    getattr(loader, "close", lambda: None)()
    return sum_over_ranks(rows).unflatten(0, tuple(chosen.shape))


def _output(net: nn.Module, images: Tensor, name: str, positions: int = 0) -> Tensor:
    """One of a network's outputs, [N, D]."""
    logits, features = net(images)
    if name != "logits" and name not in features:
        raise missing_feature(name, features)
    value: Tensor = full_precision(logits if name == "logits" else features[name])
    if positions and value.ndim > 2:
        vectors = value.flatten(2)
        value = vectors[:, :, spread(vectors.shape[2], positions).to(value.device)].mT
    return value.flatten(1)


def _key(cfg: Any, data: Data, teacher: nn.Module, fact: TeacherFact) -> str:
    """Everything that a fact depends on, in one line."""
    parts = {
        "network": digest(teacher_identity(cfg)),
        "weights": teacher_digest(teacher),
        "images": image_set_digest(data.train.dataset),
        "preprocessing": f"{data.mean} {data.std} {data.image_size} {data.preprocessing}",
        "output": fact.output,
        "per_class": fact.per_class,
        "recipe": fact.recipe,
        **({"positions": fact.positions} if fact.positions else {}),
        **({} if fact.by_class else {"by_class": False}),
        "mdistiller": __version__,
    }
    return json.dumps(parts, sort_keys=True)


def _read(path: Path, key: str) -> Any:
    """The array stored in a file; None if the file has another key or is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            value, stored, check = file["value"], str(file["key"]), str(file["check"])
        if stored == key and check == _check(key, value):
            return value
        reason = "its contents and their hash disagree"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = first_line(error)
    print_log(f"teacher fact {path} is damaged ({reason}) and made anew")
    return None


def _write(path: Path, key: str, value: Any) -> Any:
    """Store an array and return it; on a full disk only the next run has to compute it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, value=value, key=np.array(key), check=np.array(_check(key, value)))
    except (OSError, UserError) as error:
        print_log(f"teacher fact not kept: {error}")
    return value


def _check(key: str, value: Any) -> str:
    return digest([key, torch.from_numpy(value)])
