"""The configuration: defaults, under a YAML file, under command-line overrides.

Defaults live beside the code they steer: each distiller registers its own node, the data package
its `DATASET` node, the engine has `cfg_defaults.py`. A key that has no default is an error that
names the nearest one. What values may be is in `cfg_values.py` (types) and `cfg_checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from mdistiller.dataset import DATASET_CONFIG
from mdistiller.distillers import DISTILLERS
from mdistiller.distillers._compose import part_names
from mdistiller.engine.config.checks import check_values
from mdistiller.engine.config.defaults import ENGINE_CONFIG
from mdistiller.engine.config.files import read_yaml
from mdistiller.engine.config.safe_yaml import shown
from mdistiller.engine.config.values import DEEPEST, as_read, coerce, flatten, is_plain, literal
from mdistiller.engine.trainer import trainer_dict
from mdistiller.engine.user_code.forks import UserCode, sections_read
from mdistiller.engine.user_code.imports import import_user_modules, resolve_fork, resolve_imports
from mdistiller.registry import UserError, is_builtin, suggest


class Config(CfgNode):
    """A yacs node that names the nearest key, takes ints for floats and reads only YAML."""

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
                raise UserError(f"{shown(key)} is no config key (a key looks like SOLVER.LR)")
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
        if "DETECTION" in incoming and "DETECTION" not in self:
            raise UserError(
                "DETECTION: this is for a detector: run it with tools/train_detection.py"
            )
        modules = resolve_imports(literal(incoming.get("IMPORTS") or [], "IMPORTS"), Path())
        if incoming.get("FORK") is not None:
            modules = [resolve_fork(incoming["FORK"], Path()), *modules]
        if modules:  # they add up; what they register has to be known before its keys are read
            for code in import_user_modules(modules):
                if code.name not in self["IMPORTS"]:
                    add_defaults(self, code)
            add_registered_nodes(self)
            self["IMPORTS"] = list(dict.fromkeys([*self["IMPORTS"], *modules]))
        rest = {k: v for k, v in incoming.items() if k not in ("IMPORTS", "FORK")}
        merge(self, rest, (), root=self)


def merge(node: CfgNode, incoming: Mapping[str, Any], path: tuple[str, ...], root: CfgNode) -> None:
    """Write `incoming` into `node` in place, checking every key and type."""
    for key, value in incoming.items():
        if not isinstance(key, str):
            raise UserError(f"{shown(key)} in {'.'.join(path)} is no config key")
        name = ".".join((*path, key))
        if value is None:  # "KEY:" without a value leaves the default
            value = {} if isinstance(node.get(key), CfgNode) else node.get(key)
        if key not in node:
            if not node.is_new_allowed():
                raise UserError(unknown_key(name, node, path, root))
            node[key] = as_new(value, name)
        elif isinstance(node[key], CfgNode):
            value = literal(value, name)  # of the command line: "{'patch_size': 4}"
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{name} is a section with keys {', '.join(node[key])}, got {shown(value)}"
                )
            merge(node[key], value, (*path, key), root)
        else:
            node[key] = coerce(value, node[key], name, fractions=not is_declared(name, root))


def is_declared(name: str, root: CfgNode) -> bool:
    """Whether the default of a key is the library's: then a whole number is meant as one."""
    first = name.partition(".")[0]
    if first in DISTILLERS or first not in root:
        return is_builtin(DISTILLERS.get(first))
    if "DETECTION" in root:
        return True
    return name in {*flatten(ENGINE_CONFIG), *flatten({"DATASET": DATASET_CONFIG})}


def as_new(value: Any, name: str) -> Any:
    """`value` for a key without default: plain, a mapping as a node."""
    if isinstance(value, Mapping) and name.count(".") < DEEPEST:
        node = Config(new_allowed=True)
        merge(node, value, (name,), node)
        return node
    value = literal(as_read(value, None, name), name)
    if isinstance(value, Mapping) and name.count(".") < DEEPEST:  # spelled on the command line
        return as_new(value, name)
    if is_plain(value):
        return value
    raise UserError(
        f"{name} wants a number, text, True, False, or lists and sections of these, got "
        f"{shown(value)}"
    )


def unknown_key(name: str, node: CfgNode, path: tuple[str, ...], root: CfgNode) -> str:
    """The error for a key that does not exist: the nearest beside it, else the nearest of all."""
    siblings = [".".join((*path, key)) for key in node]
    nearest = suggest(name, siblings) or (suggest(name, flatten(root)) if not path else "")
    keys = f" (keys of {'.'.join(path)}: {', '.join(node)})" if path and not nearest else ""
    plain = name if name.isprintable() and len(name) <= 120 else shown(name)
    return f"unknown config key {plain}{nearest}{keys}"


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
    if "DETECTION" in cfg:
        if is_fork:
            raise UserError(f"FORK {code.name}: forks are for classification, not for detection")
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
    check_values(cfg)
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
