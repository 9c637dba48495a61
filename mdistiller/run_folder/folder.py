"""Read a run folder: its config, its checkpoints, its records."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdistiller.config.files import require_run
from mdistiller.config.safe_yaml import shown
from mdistiller.dataset import DATASET_CONFIG, data_spec, eval_preprocessing
from mdistiller.engine.cfg import Config, load_config
from mdistiller.registry import UserError
from mdistiller.run_folder.record import recorded_settings
from mdistiller.user_code.imports import is_imported


def recorded_config(
    folder: Path,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    load: Callable[..., Config] = load_config,
) -> Config:
    """The config of a run, with `[key, value, ...]` and IMPORTS over it.

    The folder may come from somebody else: code that its config names runs only if `imports` names
    the same file or module.

    Args:
        load: `load_config` of this kind of run.

    Raises:
        UserError: it is not a run folder, or its config names other code.
    """
    require_run(folder)
    table = recorded_settings(folder)
    named = table.pop("IMPORTS", None) or []
    given = {_own_name(name) for name in imports}
    for name in [named] if isinstance(named, str) else named:
        if _own_name(str(name)) not in given and not is_imported(str(name)):
            raise UserError(
                f"{folder} was trained with code of its own, which runs only if you name it, too: "
                f"look at it, and give {'--fork' if str(name).endswith('/') else '--import'} "
                f"{shown(str(name))[1:-1]}"
            )
    allowed = [name for name in named if is_imported(str(name))]
    cfg = load(table, overrides, [*imports, *allowed])
    if load is load_config and "DATASET.RESIZE" not in overrides[0::2] and stretched(table, cfg):
        cfg.defrost()
        cfg.DATASET.RESIZE, cfg.DATASET.EXIF = "stretch", False
        cfg.freeze()
    if load is load_config and "DATASET.JPEG_SCALING" not in overrides[0::2]:
        keep_full_decoding(table, cfg)
    return cfg


def config_to_resume(
    folder: Path,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    load: Callable[..., Config] = load_config,
) -> Config:
    """The :func:`recorded_config` of a run that is to go on in its folder, wherever that is now.

    Raises:
        UserError: likewise.
    """
    require_run(folder, "--resume: ", "")
    cfg = recorded_config(folder, overrides, imports, load).clone()
    cfg.defrost()
    place, project = folder.resolve(), Path(cfg.EXPERIMENT.PROJECT).parts
    if place.parent.parts[-len(project) :] != project:  # it was moved
        project = (place.parent.name,)
    root = place.parents[len(project)]
    cfg.EXPERIMENT.NAME, cfg.EXPERIMENT.PROJECT = place.name, "/".join(project)
    if Path(cfg.LOG.PREFIX).resolve() != root:
        cfg.LOG.PREFIX = os.path.relpath(root) if root.is_relative_to(Path.cwd()) else str(root)
    cfg.freeze()
    return cfg


def keep_full_decoding(recorded: Mapping[str, Any], cfg: Config) -> None:
    """Turn off DATASET.JPEG_SCALING for a run older than this key, unless it is set.

    Args:
        recorded: the run's config.
        cfg: the same with all keys; changed in place.
    """
    unset = DATASET_CONFIG["JPEG_SCALING"] == cfg.DATASET.JPEG_SCALING
    if unset and "JPEG_SCALING" not in recorded.get("DATASET", {}):
        cfg.defrost()
        cfg.DATASET.JPEG_SCALING = "none"
        cfg.freeze()


def stretched(recorded: Mapping[str, Any], cfg: Config) -> bool:
    """Whether a run's photographs were stretched and would now be cropped.

    Runs older than DATASET.RESIZE stretched them, and ignored their EXIF orientation.

    Args:
        recorded: its config.
        cfg: the same with all keys.
    """
    if "RESIZE" in recorded.get("DATASET", {}) or not data_spec(cfg).files:
        return False
    view = eval_preprocessing(cfg)
    return not data_spec(cfg).keeps_shape and view.resize == "crop" and view.crop_pct != 1


def _own_name(imported: str) -> str:
    """A module's name, or the name of a file or fork without its folder."""
    return Path(imported).name if imported.endswith((".py", "/")) else imported


def refuse_commands(folder: Path, cfg: Config, overrides: Sequence[str]) -> None:
    """Refuse URLs of shards in a run's config: they may be, or lead to, shell commands.

    Raises:
        UserError: the config has such URLs, and the user has not named them.
    """
    for key in ("TRAIN", "VAL"):
        name, pattern = f"DATASET.SHARDS.{key}", cfg.DATASET.SHARDS[key]
        if ":" in pattern and name not in overrides[0::2]:
            raise UserError(
                f"{folder} names its images by a URL, which may run a command: look at it, and "
                f"give {name} {shown(pattern)}"
            )


def checkpoint_file(folder: Path, name: str) -> Path:
    """The file with the student's weights for a checkpoint's name.

    Raises:
        UserError: the name is not a checkpoint, or the run has no such checkpoint.
    """
    if not re.fullmatch(r"(ema_|peer\d+_)?(best|latest)|(peer\d+_)?epoch_\d+", name):
        raise UserError(
            f"--checkpoint is best, latest, epoch_N, ema_best or ema_latest, got {name!r} (of "
            "networks under DISTILLER.PEERS: peer1_best and the like)"
        )
    places = [folder / f"student_{name.replace('epoch_', '')}", folder / name]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        there = [path.name.replace("student_", "") for path in sorted(folder.glob("student_*"))]
        raise UserError(
            f"{folder} has no checkpoint {name} (it has: "
            f"{', '.join(f'epoch_{n}' if n.isdigit() else n for n in there) or 'none'})"
            f"{'; it kept no moving average (SOLVER.EMA)' if name.startswith('ema_') else ''}"
        )
    return file


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if the file does not exist.

    Raises:
        UserError: it holds no mapping.
    """
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is damaged: it is not a mapping")
    return contents


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a JSON Lines file; empty if the file does not exist.

    Raises:
        UserError: a line holds no mapping.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
