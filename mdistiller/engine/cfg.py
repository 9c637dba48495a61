"""The configuration: defaults, under a YAML file, under command-line overrides.

Defaults live beside the code they steer: each distiller registers its own node, the data package
its `DATASET` node; the others are in `config/defaults.py`. A key that has no default is an error
that names the nearest one. How a config is merged is in `config/node.py`; what values may be, in
`config/values.py` (types) and `config/checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from mdistiller.config.defaults import ENGINE_CONFIG
from mdistiller.config.node import ConfigNode, fill
from mdistiller.config.safe_yaml import shown
from mdistiller.config.tasks import task_of
from mdistiller.config.values import coerce, flatten
from mdistiller.dataset import DATASET_CONFIG
from mdistiller.distillers import DISTILLERS, part_names
from mdistiller.engine import trainer_dict
from mdistiller.registry import UserError, is_builtin
from mdistiller.user_code.forks import UserCode, sections_read
from mdistiller.user_code.imports import import_user_modules


class Config(ConfigNode):
    """A config whose defaults are those of all methods and data sets that are registered."""

    def import_user_code(self, modules: list[str]) -> None:
        for code in import_user_modules(modules):
            if code.name not in self["IMPORTS"]:
                add_defaults(self, code)
        add_registered_nodes(self)

    def is_declared(self, name: str) -> bool:
        first = name.partition(".")[0]
        if first in DISTILLERS or first not in self:
            return is_builtin(DISTILLERS.get(first))
        if task_of(self) is not None:
            return True
        return name in {*flatten(ENGINE_CONFIG), *flatten({"DATASET": DATASET_CONFIG})}


def add_registered_nodes(cfg: CfgNode) -> None:
    """Add the default nodes of methods that were registered since `cfg` was made."""
    for name in DISTILLERS:
        if name not in cfg and name != "NONE":
            declared = DISTILLERS.config.get(name)
            cfg[name] = Config(declared or {}, new_allowed=declared is None)


def add_defaults(cfg: CfgNode, code: UserCode) -> None:
    """Take the defaults of user code: whole nodes of methods that it replaces or, of a fork, has;
    a fork's other keys where the library has them.

    Where files go and what is logged stays as the library has it.

    Raises:
        UserError: the library has a key of another type, or `cfg` is of another kind of run.
    """
    is_fork = code.name.endswith("/")
    if task_of(cfg) is not None:
        if is_fork:
            raise UserError(f"FORK {code.name}: forks are for classification alone")
        return
    for name in code.methods:
        cfg[name] = Config(code.defaults.get(name, {}), new_allowed=name not in code.defaults)
    for name, value in code.defaults.items():
        if name not in code.methods:
            _overlay(cfg, {name: value}, (), name == "LOG", code)


def _overlay(
    node: CfgNode, values: Mapping[str, Any], path: tuple[str, ...], keep: bool, code: UserCode
) -> None:
    """Lay a fork's defaults over those of the library; `keep`: only add what these lack."""
    for key, value in values.items():
        name = ".".join((*path, key))
        if key not in node:
            node[key] = Config(value) if isinstance(value, Mapping) else value
        elif isinstance(node[key], CfgNode) != isinstance(value, Mapping):
            raise UserError(f"FORK {code.name}: engine/cfg.py: {name} is {shown(value)}")
        elif isinstance(value, Mapping):
            _overlay(node[key], value, (*path, key), keep, code)
        elif not keep and value is not None:
            try:
                node[key] = coerce(value, node[key], name)
            except UserError as error:
                raise UserError(f"FORK {code.name}: engine/cfg.py: {error}") from None


def default_config() -> Config:
    """A fresh config that holds every default."""
    cfg = Config({**ENGINE_CONFIG, "DATASET": DATASET_CONFIG}).clone()
    for role in ("TEACHER", "STUDENT"):
        cfg.DISTILLER[f"{role}_ARGS"] = Config(new_allowed=True)
    cfg.SOLVER.OPTIMIZER_ARGS = Config(new_allowed=True)
    add_registered_nodes(cfg)
    return cfg


def load_config(
    path: str | Path | Mapping[str, Any] = "",
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    defaults: Config | None = None,
) -> Config:
    """Defaults, then the file, then `[key, value, ...]`; checked, and frozen.

    Args:
        path: of a YAML file, or what one holds.
        imports: further IMPORTS, relative to the working directory.
        defaults: of another kind of run than classification.
    """
    cfg = (CFG if defaults is None else defaults).clone()
    if defaults is None:
        add_registered_nodes(cfg)
    fill(cfg, path, overrides, imports)
    cfg.freeze()
    return cfg


def method_nodes(cfg: CfgNode) -> list[str]:
    """Nodes that the method and the trainer of a config read: those of its parts' names; of a
    user's class (KD_ours) also the nodes that its file reads (KD)."""
    parts = part_names(cfg.DISTILLER.TYPE)
    classes = [DISTILLERS.get(part) for part in parts] + [trainer_dict.get(cfg.SOLVER.TRAINER)]
    read = {name for cls in classes for name in sections_read(cls)}
    return [*parts, *(name for name in cfg if name in read & {*DISTILLERS} - {*parts})]


def own_sections(cfg: CfgNode) -> list[str]:
    """Sections that a kind of run has beside those of classification."""
    return [key for key in cfg if key not in {*ENGINE_CONFIG, "DATASET", *DISTILLERS}]


def dump_cfg(cfg: CfgNode) -> str:
    """YAML of all that matters for a run: every common key, and its method's node."""
    keys = [*ENGINE_CONFIG, "DATASET", *method_nodes(cfg), *own_sections(cfg)]
    text: str = CfgNode({key: cfg[key] for key in keys if key in cfg}).dump(sort_keys=False)
    return text


def show_cfg(cfg: CfgNode) -> str:
    """Print and return :func:`dump_cfg`."""
    text = dump_cfg(cfg)
    print(text)
    return text


CFG = default_config()
