"""A config: a yacs node that names the nearest key, takes ints for floats and reads only YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from mdistiller.config.checks import check_values
from mdistiller.config.files import (
    AUTO,
    TAG,
    read_layers,
    read_yaml,
    resolve_fork,
    resolve_imports,
)
from mdistiller.config.safe_yaml import shown
from mdistiller.config.tasks import NETWORKS, task_of
from mdistiller.config.values import DEEPEST, as_read, coerce, flatten, is_plain, literal
from mdistiller.registry import UserError, suggest
from mdistiller.runtime import config_root


class ConfigNode(CfgNode):
    """Merges YAML files, overrides and mappings, each key and type checked.

    What to do with files under IMPORTS and FORK is up to the subclass.
    """

    def import_user_code(self, modules: list[str]) -> None:
        """Import modules under IMPORTS, and add the defaults that they register."""
        raise NotImplementedError

    def is_declared(self, name: str) -> bool:
        """Whether the default of a key is the library's: then a whole number is meant as one."""
        return True

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a YAML file, its `_BASE_` files first; modules under IMPORTS are imported."""
        self._merge_root(read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge `[key, value, key, value, ...]`; string values are read as Python literals."""
        if len(cfg_list) % 2:
            raise UserError(
                f"overrides come as KEY VALUE pairs, but {shown(cfg_list[-1])} has no partner"
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            if not isinstance(key, str) or not all(key.split(".")) or key.count(".") > DEEPEST:
                raise UserError(f"{shown(key)} is not a config key (a key looks like SOLVER.LR)")
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            self._merge_root(nested)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another config or a nested mapping."""
        self._merge_root(cfg_other)

    def _merge_root(self, incoming: Mapping[str, Any]) -> None:
        if self.is_frozen():
            raise AttributeError("this config is frozen; clone() and defrost() it to change it")
        if "SWEEP" in incoming:
            raise UserError(
                f"SWEEP: {shown(incoming['SWEEP'])} is a sweep: run it with tools/sweep.py"
            )
        task = task_of(incoming)
        if task is not None and task.section not in self:
            raise UserError(f"{task.section}: {task.runs_by}")
        modules = resolve_imports(literal(incoming.get("IMPORTS") or [], "IMPORTS"), Path())
        if incoming.get("FORK") is not None:
            modules = [resolve_fork(incoming["FORK"], Path()), *modules]
        if modules:  # they add up; what they register is needed before its keys are read
            self.import_user_code(modules)
            self["IMPORTS"] = list(dict.fromkeys([*self["IMPORTS"], *modules]))
        rest = {k: v for k, v in incoming.items() if k not in ("IMPORTS", "FORK")}
        merge(self, rest, (), root=self)


def fill(
    cfg: ConfigNode,
    path: str | Path | Mapping[str, Any] = "",
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> None:
    """Lay a file and `[key, value, ...]` over the defaults in `cfg`, and check the values.

    Args:
        path: of a YAML file, or what one holds.
        imports: further IMPORTS, relative to the working directory.
    """
    if imports:
        cfg.merge_from_list(["IMPORTS", list(imports)])
    forks = [v for k, v in zip(overrides[0::2], overrides[1::2], strict=False) if k == "FORK"]
    for fork in forks:  # its defaults lie under the file
        cfg.merge_from_list(["FORK", fork])
    if isinstance(path, Mapping):
        cfg.merge_from_other_cfg(path)
    elif path:
        cfg.merge_from_file(path)
    cfg.merge_from_list(overrides)
    if isinstance(path, (str, Path)) and path and not cfg["EXPERIMENT"]["NAME"]:
        cfg["EXPERIMENT"]["NAME"] = _name(cfg, Path(path), overrides)
    check_values(cfg)


def _name(cfg: ConfigNode, path: Path, overrides: Sequence[str]) -> str:
    """The NAME of a run whose only name is the TAG of one of the library's configs.

    The TAG with hyphens for its commas, or AUTO if a file that builds on that config, or the
    command line, changes method or networks; "" for a TAG of the user's own.
    """
    given = set(overrides[0::2])
    task = task_of(cfg)
    naming = {"DISTILLER.TYPE", *(task.networks if task else NETWORKS)}
    owner, changed = None, bool(naming & given)
    for file, table in read_layers(path):
        keys = set(flatten(table))
        if TAG in keys:
            owner, changed = file, bool(naming & given)
        elif naming & keys:
            changed = True
    if owner is None or TAG in given or not owner.is_relative_to(config_root().resolve()):
        return ""
    return AUTO if changed else str(cfg["EXPERIMENT"]["TAG"]).replace(",", "-")


def merge(
    node: CfgNode, incoming: Mapping[str, Any], path: tuple[str, ...], root: ConfigNode
) -> None:
    """Write `incoming` into `node` in place, checking every key and type."""
    for key, value in incoming.items():
        if not isinstance(key, str):
            raise UserError(f"{shown(key)} in {'.'.join(path)} is not a config key")
        name = ".".join((*path, key))
        if value is None:  # "KEY:" without a value leaves the default
            value = {} if isinstance(node.get(key), CfgNode) else node.get(key)
        if key not in node:
            if not node.is_new_allowed():
                raise UserError(unknown_key(name, node, path, root))
            node[key] = as_new(value, name, type(root))
        elif isinstance(node[key], CfgNode):
            value = literal(value, name)  # of the command line: "{'patch_size': 4}"
            if not isinstance(value, Mapping):
                keys = f" with keys {', '.join(node[key])}" if node[key] else ""
                raise UserError(
                    f"{name} is a section{keys}, in quotes \"{{'KEY': value}}\" on the command "
                    f"line, got {shown(value)}"
                )
            merge(node[key], value, (*path, key), root)
        else:
            node[key] = coerce(value, node[key], name, fractions=not root.is_declared(name))


def as_new(value: Any, name: str, kind: type[ConfigNode]) -> Any:
    """`value` for a key without default: plain, a mapping as a node."""
    if isinstance(value, Mapping) and name.count(".") < DEEPEST:
        node = kind(new_allowed=True)
        merge(node, value, (name,), node)
        return node
    value = literal(as_read(value, None, name), name)
    if isinstance(value, Mapping) and name.count(".") < DEEPEST:  # spelled on the command line
        return as_new(value, name, kind)
    if is_plain(value):
        return value
    raise UserError(
        f"{name} must be a number, text, True, False, or lists and sections of these, got "
        f"{shown(value)}"
    )


def unknown_key(name: str, node: CfgNode, path: tuple[str, ...], root: CfgNode) -> str:
    """The error for a key that does not exist: the nearest beside it, else the nearest of all."""
    siblings = [".".join((*path, key)) for key in node]
    nearest = suggest(name, siblings) or (suggest(name, flatten(root)) if not path else "")
    keys = f" (keys of {'.'.join(path)}: {', '.join(node)})" if path and not nearest else ""
    plain = name if name.isprintable() and len(name) <= 120 else shown(name)
    return f"unknown config key {plain}{nearest}{keys}"
