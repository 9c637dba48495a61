"""A student's weights without its classifier, under the key names of its own library.

timm and torchvision load such a file strictly, without this library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mdistiller.export.student import Student
from mdistiller.files.atomic import replacing
from mdistiller.models.external import import_timm
from mdistiller.registry import UserError
from mdistiller.weights import head_state

FILE = "backbone.pth"


def export_backbone(student: Student, out: Path, force: bool = False) -> tuple[Path, str]:
    """Write `backbone.pth`, a state dict, to `out`.

    Args:
        force: replace a file that is there.

    Returns:
        The file, and how to load it, in words.

    Raises:
        UserError: the file is there, or the network has no backbone in its library.
    """
    path, state = out / FILE, student.net.state_dict()
    if path.exists() and not force:
        raise UserError(f"{path} is there already; replace it by --force")
    library, _, name = student.name.partition("/")
    if library == "timm":
        wanted, settings = _of_timm(student, name)
        words = "".join(f", {key}={value!r}" for key, value in settings.items())
        usage = f'timm.create_model("{name}"{words}, checkpoint_path="{path}")'
    elif hasattr(student.net, "classifier"):
        wanted = state.keys() - head_state(student.net).keys()
        head = getattr(student.net, "head", "fc")
        whose = f"torchvision's {name}" if library == "torchvision" else student.name
        usage = f'torch.load("{path}"), for {whose} with an nn.Identity() as {head}'
        if student.channels != 3:
            usage += f" and a first convolution for {student.channels} channels"
    else:
        raise UserError(f"{student.name} has no classifier() that could be left out of its file")
    missing = sorted(wanted - state.keys())
    if missing:
        raise UserError(f"{student.name} lacks {missing[0]} of its library's backbone")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({key: value for key, value in state.items() if key in wanted}, temporary)
    return path, usage


def _of_timm(student: Student, name: str) -> tuple[set[str], dict[str, Any]]:
    """The keys of timm's backbone without classifier, and the arguments that build it."""
    settings = {"num_classes": 0, **student.settings}
    if student.channels != 3:
        settings["in_chans"] = student.channels
    sized = {"img_size": student.image_size, **settings}
    create = import_timm().create_model
    try:
        return set(create(name, **sized).state_dict()), sized
    except TypeError:  # of an architecture for images of any size
        return set(create(name, **settings).state_dict()), settings
