"""Names of run folders, and where runs of earlier versions lie."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdistiller.config.files import AUTO, TAG
from mdistiller.config.safe_yaml import parse_yaml
from mdistiller.config.tasks import NETWORKS, task_of
from mdistiller.config.values import flatten, lookup
from mdistiller.distillers import DISTILLERS
from mdistiller.engine.cfg import Config
from mdistiller.registry import UserError

NAME, SEED = "EXPERIMENT.NAME", "EXPERIMENT.SEED"
_LONGEST = 200  # bytes of a folder name; file systems allow 255
# Keys that say where files go, not what is trained: they stay out of a run folder's name.
_PLACES = (
    *(NAME, TAG, "EXPERIMENT.PROJECT"),
    *("LOG.PREFIX", "IMPORTS", "FORK", "DISTILLER.TEACHER_CACHE_DIR"),
)
_DATA = ("DATASET.TYPE", "DATASET.ROOT")


def experiment_name(cfg: Config, overrides: Sequence[str] = ()) -> str:
    """`PROJECT/NAME` of a run folder; that of an earlier version if the run lies there.

    NAME is EXPERIMENT.NAME, else TAG, else method, networks and data; then the overrides. A NAME
    among the overrides is the whole name. Long names end in a hash.

    Args:
        overrides: the command line's `[key, value, ...]`.
    """
    given = dict(zip(overrides[0::2], overrides[1::2], strict=True))
    name = _in_project(cfg, _name(cfg, given))
    root = Path(cfg.LOG.PREFIX)
    if not (root / name).exists():
        old = _in_project(cfg, _old_name(cfg, given))
        if _is_run_of(root / old, cfg):
            return old
    return name


def folder_word(text: str) -> str:
    """A text as part of a folder's name that needs no quotes in a shell."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_") or "_"


def automatic_name(cfg: Config) -> str:
    """Method, networks, and the data unless PROJECT names them: `kd-res32x4-res8x4`."""
    method, task = cfg.DISTILLER.TYPE, task_of(cfg)
    teacher, student = (str(lookup(cfg, key)) for key in (task.networks if task else NETWORKS))
    taught = getattr(DISTILLERS.get(method), "uses_teacher", method != "NONE")
    lists = [cfg.DISTILLER.get(key, []) for key in ("TEACHERS", "PEERS")]
    teachers, peers = ([entry["NAME"] for entry in entries] for entries in lists)
    students = "+".join(map(_short, [student, *peers]))
    words = ["+".join(map(_short, teachers or [teacher])), students] if taught else [students]
    words.insert(0, "vanilla" if method == "NONE" else method.lower())
    if task is None and cfg.DATASET.TYPE.lower() not in cfg.EXPERIMENT.PROJECT.lower():
        words.append(Path(cfg.DATASET.ROOT).name or cfg.DATASET.TYPE)
    return "-".join(folder_word(word) for word in words)


def _short(network: str) -> str:
    return network.rpartition("/")[2].lower().replace("resnet", "res")


def _name(cfg: Config, given: Mapping[str, Any]) -> str:
    if given.get(NAME, AUTO) != AUTO:
        return str(cfg.EXPERIMENT.NAME)
    left_out, base = set(_PLACES), cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    if _is_automatic(cfg):
        task = task_of(cfg)
        left_out |= {"DISTILLER.TYPE", *(task.networks if task else NETWORKS), *_DATA}
        base = automatic_name(cfg)
    items = {key: value for key, value in given.items() if key not in left_out}
    short = [key.rpartition(".")[2] for key in items]
    words = [base]
    for (key, value), last in zip(items.items(), short, strict=True):
        word = "seed" if key == SEED else last if short.count(last) == 1 else key
        words.append(f"{word}={folder_word(str(value))}")
    return "-".join(words)


def _is_automatic(cfg: Config) -> bool:
    name, tag = cfg.EXPERIMENT.NAME, cfg.EXPERIMENT.TAG
    return name == AUTO or (not name and tag in ("", "default"))


def _old_name(cfg: Config, given: Mapping[str, Any]) -> str:
    """The name that earlier versions gave: `TAG,METHOD,...KEY:VALUE,KEY:VALUE`."""
    name, tag = cfg.EXPERIMENT.NAME, cfg.EXPERIMENT.TAG
    if given.get(NAME, AUTO) != AUTO:
        return str(name)
    items = ",".join(f"{key}:{value}" for key, value in given.items() if key not in _PLACES)
    by_tag = name in ("", AUTO, tag.replace(",", "-"))
    return f"{tag if by_tag else name}{items}"


def _is_run_of(folder: Path, cfg: Config) -> bool:
    """Whether a folder has a run with this method and these networks; also one without config."""
    try:
        recorded = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        values = {key: lookup(recorded, key) for key in flatten(recorded)}
    except (OSError, ValueError, TypeError, AttributeError):
        return (folder / "latest").is_file()
    task = task_of(cfg)
    keys = ("DISTILLER.TYPE", *(task.networks if task else NETWORKS))
    return all(values.get(key, lookup(cfg, key)) == lookup(cfg, key) for key in keys)


def _in_project(cfg: Config, name: str) -> str:
    """`PROJECT/NAME`, checked and of a length that file systems allow."""
    name = name.replace("/", "_").replace(os.sep, "_")
    raw = name.encode()
    if len(raw) > _LONGEST:
        digest = hashlib.sha256(raw).hexdigest()[:10]
        name = f"{raw[: _LONGEST - 11].decode(errors='ignore')}-{digest}"
    parts = [*Path(cfg.EXPERIMENT.PROJECT).parts, name]
    if name in ("", ".") or any(part in ("..", "/") for part in parts):
        raise UserError(f"EXPERIMENT.PROJECT and NAME make no folder name: {'/'.join(parts)!r}")
    return "/".join(parts)
