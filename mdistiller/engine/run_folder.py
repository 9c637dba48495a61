"""Reading of a run folder: its config, the checkpoints it holds, what it says about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.engine.cfg import Config, load_config
from mdistiller.registry import UserError


def recorded_config(
    folder: Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> Config:
    """The config of a run, with `[key, value, ...]` and IMPORTS over it.

    Raises:
        UserError: it is no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is no run folder: it has no config.yaml; for a checkpoint without one, name "
            "the network and the file by -m and -c"
        )
    return load_config(folder / "config.yaml", overrides, imports)


def checkpoint_file(folder: Path, name: str) -> Path:
    """The file with the student's weights of a checkpoint that was asked for by name.

    Raises:
        UserError: the name is none, or the run has no such checkpoint.
    """
    if not re.fullmatch(r"(ema_)?(best|latest)|epoch_\d+", name):
        raise UserError(
            f"--checkpoint is best, latest, epoch_N, ema_best or ema_latest, got {name!r}"
        )
    places = [folder / f"student_{name.removeprefix('epoch_')}", folder / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        there = [path.name.replace("student_", "") for path in sorted(folder.glob("student_*"))]
        raise UserError(
            f"{folder} has no checkpoint {name} (it has: "
            f"{', '.join(f'epoch_{n}' if n.isdigit() else n for n in there) or 'none'})"
            f"{'; it kept no moving average (SOLVER.EMA)' if name.startswith('ema_') else ''}"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file's mapping; empty if there is none.

    Raises:
        UserError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no mapping")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file, one a line; none if it is not there.

    Raises:
        UserError: a line holds something else.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
