"""A research fork of the original library, run as it is: `--fork DIR`, or `FORK: DIR` in a config.

DIR has the original's layout: `mdistiller/distillers`, `mdistiller/engine`, and so on. Taken are

- the methods of its `distiller_dict`, under the names that it gives them,
- the trainers of its `trainer_dict`,
- the defaults of its `engine/cfg.py`: whole nodes of methods, and other keys as far as they differ,
- whatever these files import (`fork_loader.py`).

Networks, data sets, loading and augmentation, logs and checkpoints are the library's. A fork is
code that runs, like a file under IMPORTS, where it is recorded with a slash behind it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mdistiller import distillers
from mdistiller.config.safe_yaml import shown
from mdistiller.distillers import DISTILLERS, Distiller
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import Registry, UserError, is_builtin
from mdistiller.user_code.fork_loader import fork_package

_TABLES = (("methods", DISTILLERS), ("trainers", trainer_dict))
Snapshot = tuple[dict[str, Any], dict[str, Any]]
"""Entries and defaults of a table."""


@dataclass
class UserCode:
    """What an entry of IMPORTS has given.

    Attributes:
        name: the entry: a fork's folder with a slash behind it, a file or a module.
        defaults: nodes and values that count in place of the library's.
        methods: names whose whole nodes are replaced.
        entries: what it has entered into the tables: (table, name) -> (class, node's defaults).
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    entries: dict[tuple[int, str], tuple[Any, Any]] = field(default_factory=dict)


LOADED: dict[str, UserCode] = {}
"""What has been imported in this process, by entry of IMPORTS."""
_ACTIVE: list[str] = []
_BEFORE: dict[tuple[int, str], tuple[Any, Any]] = {}
_ABSENT = object()


def fork_folder(folder: Path) -> Path | None:
    """The folder of a fork that has `distillers/` in it, or None."""
    for place in (folder / "mdistiller", folder, *sorted(folder.glob("*/mdistiller"))):
        if (place / "distillers").is_dir():
            return place
    return None


def load_fork(name: str) -> UserCode:
    """The fork in a folder, imported and registered at the first call.

    Raises:
        UserError: the folder holds no fork, or a file of it fails when imported.
    """
    if name not in LOADED:
        place = fork_folder(Path(name))
        if place is None:
            raise UserError(
                f"FORK: {shown(name)[1:-1]} has no folder mdistiller/distillers, as the original "
                "and its forks have"
            )
        fork = UserCode(name)
        package = fork_package(place.resolve())
        before = snapshot()
        trainers, reason = _trainers(package, place)
        fork.defaults = _defaults(package, place)
        methods = _methods(_import(f"{package}.distillers", place))
        _register(DISTILLERS, methods, fork.defaults)
        _register(trainer_dict, trainers, {})
        fork.methods = tuple(methods)
        report(f"fork {Path(name)}", before, _rest(fork) + reason)
        keep(fork, before)
    return put_in_force(name)


def keep(code: UserCode, before: Sequence[Snapshot], only_replaced: bool = False) -> None:
    """Remember what user code has registered since `before`, so that it can be taken back."""
    for k, (entries, config) in enumerate(before):
        table = _TABLES[k][1]
        for name in table:
            if table[name] is entries.get(name) or (only_replaced and name not in entries):
                continue
            code.entries[k, name] = (table[name], table.config.get(name, _ABSENT))
            earlier = (entries.get(name, _ABSENT), config.get(name, _ABSENT))
            _BEFORE.setdefault((k, name), earlier)
    LOADED[code.name] = code


def put_in_force(name: str) -> UserCode:
    """Have what an entry of IMPORTS has registered count before that of all others."""
    code = LOADED[name]
    _enter(code.entries)
    _ACTIVE[:] = [*(other for other in _ACTIVE if other != name), name]
    return code


def activate(names: Sequence[str]) -> None:
    """Have the tables hold what these entries of IMPORTS replace or, forks, add, and no others.

    What a program has put into the tables by itself stays.
    """
    imported = {id(item) for code in LOADED.values() for item, _ in code.entries.values()}
    current = {at: id(_TABLES[at[0]][1].get(at[1])) for at in _BEFORE}
    _enter({at: entry for at, entry in _BEFORE.items() if current[at] in imported})
    _ACTIVE.clear()
    for name in names:
        if name in LOADED:
            put_in_force(name)


@contextlib.contextmanager
def active(names: Sequence[str] | None = None) -> Iterator[None]:
    """Of several configs in a process, that with these IMPORTS; afterwards what was before.

    None: what is in force now, whatever is imported within.
    """
    before = list(_ACTIVE)
    try:
        if names is not None:
            activate(names)
        yield
    finally:
        activate(before)


def _enter(entries: Mapping[tuple[int, str], tuple[Any, Any]]) -> None:
    for (k, name), (item, config) in entries.items():
        table = _TABLES[k][1]
        for part, value in ((table, item), (table.config, config)):
            if value is _ABSENT:
                part.pop(name, None)
            else:
                part[name] = value


def around(file: Path) -> Path | None:
    """The folder of the fork that a method's file is part of; None: it stands for itself."""
    layout = file.parent.name == "distillers" and (file.parent / "_base.py").is_file()
    return (
        file.parent.parent if layout and file.parent != Path(distillers.__file__).parent else None
    )


def import_method(file: Path, place: Path) -> tuple[ModuleType, Mapping[str, Any]]:
    """One method's file of a fork, and the defaults of the fork."""
    package = fork_package(place)
    return _import(f"{package}.distillers.{file.stem}", place), _defaults(package, place)


def snapshot() -> list[Snapshot]:
    """What is registered now, for :func:`report` and :func:`keep`."""
    return [(dict(table), dict(table.config)) for _, table in _TABLES]


def report(
    what: str, before: Sequence[Snapshot], rest: str = "", only_replaced: bool = False
) -> None:
    """Print in a line what user code has registered since `before`, and what it replaced."""
    parts = []
    for k, ((kind, table), (earlier, _)) in enumerate(zip(_TABLES, before, strict=True)):
        library = earlier | {name: old for (t, name), (old, _) in _BEFORE.items() if t == k}
        taken = [name for name in table if table[name] is not earlier.get(name)]
        replaced = [name for name in taken if is_builtin(library.get(name, _ABSENT))]
        if taken and not only_replaced:
            parts.append(f"{kind} {', '.join(taken)}")
        if replaced:
            parts.append(f"in place of the library's {kind}: {', '.join(replaced)}")
    parts += [rest] if rest else []
    if parts and os.environ.get("RANK", "0") == "0":
        print(f"{what}: {'; '.join(parts)}", flush=True)


def sections_read(cls: Any) -> set[str]:
    """Names behind `cfg.` in the files of a user's class and of those it derives from."""
    names: set[str] = set()
    for base in getattr(cls, "__mro__", ()):
        module = sys.modules.get(base.__module__)
        file = getattr(module, "__file__", None)
        if is_builtin(base) or not file or not issubclass(base, (Distiller, BaseTrainer)):
            continue
        names |= set(re.findall(r"\b\w*(?i:cfg)\.([A-Za-z]\w*)", Path(file).read_text("utf-8")))
    return names


def _rest(fork: UserCode) -> str:
    nodes = [name for name in fork.defaults if isinstance(fork.defaults[name], Mapping)]
    return f"defaults of engine/cfg.py: {', '.join(nodes)}" if nodes else "no engine/cfg.py"


def _trainers(package: str, place: Path) -> tuple[Mapping[str, Any], str]:
    """A fork's trainers by name, or why they are unusable: the rest does without them."""
    try:
        engine = _import(f"{package}.engine", place)
    except UserError as error:
        empty = ModuleType(f"{package}.engine")
        empty.__path__ = [str(place / "engine")]
        sys.modules[empty.__name__] = empty
        return {}, f"; no trainers: {error}"
    return getattr(engine, "trainer_dict", {}), ""


def _import(name: str, place: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        part = "/".join(name.split(".")[1:])
        raise UserError(f"FORK: {place / part} fails when imported: {reason}") from error


def _defaults(package: str, place: Path) -> Mapping[str, Any]:
    """The defaults that a fork's cfg.py holds, as nested mappings."""
    if not (place / "engine" / "cfg.py").is_file():
        return {}
    defaults = getattr(_import(f"{package}.engine.cfg", place), "CFG", None)
    if not isinstance(defaults, Mapping):
        raise UserError(f"FORK: {place}/engine/cfg.py gives no CFG, a yacs node of defaults")
    return _mapping(defaults)


def _mapping(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _mapping(value) if isinstance(value, Mapping) else value
        for key, value in node.items()
    }


def _methods(module: ModuleType) -> dict[str, Any]:
    """A fork's methods by name; without a `distiller_dict` its classes by theirs."""
    table = getattr(module, "distiller_dict", None)
    if not isinstance(table, Mapping):
        table = {
            item.__name__: item
            for item in vars(module).values()
            if isinstance(item, type) and issubclass(item, Distiller)
        }
    return {name: cls for name, cls in table.items() if not is_builtin(cls)}


def _register(table: Registry, entries: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Enter a fork's classes; the library's, which it may list as well, are there."""
    for name, cls in entries.items():
        if not is_builtin(cls):
            table[name] = cls
            table.config.pop(name, None)
            if name in defaults:
                table.config[name] = defaults[name]


def check_trainer(name: str) -> type[BaseTrainer]:
    """The class of a SOLVER.TRAINER.

    Raises:
        UserError: the name is unknown, or the class cannot be run by the commands.
    """
    cls = trainer_dict[name]
    if isinstance(cls, type) and issubclass(cls, BaseTrainer):
        return cls
    raise UserError(
        f"SOLVER.TRAINER {name}: {getattr(cls, '__name__', shown(cls))} does not derive from "
        "mdistiller.engine.trainer.BaseTrainer, which brings checkpoints, logs and resuming: let it"
    )
