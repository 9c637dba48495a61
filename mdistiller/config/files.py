"""YAML files of configs: where they are, and what they hold over their `_BASE_` files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from os.path import isdir, isfile  # False too for what can be no name of a file
from pathlib import Path
from typing import Any

from mdistiller.config.safe_yaml import as_text, parse_yaml, shown
from mdistiller.registry import UserError, suggest
from mdistiller.runtime import config_root

_MOST_FILES = 100  # that one config is built of
TAG = "EXPERIMENT.TAG"
AUTO = "auto"
"""EXPERIMENT.NAME of a run whose folder is named by method, networks and data."""
Layers = list[tuple[Path, dict[str, Any]]]
"""The files of a config, those that it builds on first, and what each sets itself."""


def find_config(name: str | Path) -> Path:
    """The file for a config name: as given, else below the package's own `configs/`."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"config {shown(str(name))} is not a .yaml file (Python configs would run code: "
            "refused)"
        )
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for candidate in (path, config_root().joinpath(*parts)):
        if isfile(candidate):
            return candidate
    configs = [p.relative_to(config_root()).as_posix() for p in config_root().rglob("*.yaml")]
    raise UserError(f"config file {shown(str(name))} not found{suggest('/'.join(parts), configs)}")


ELSE = "; for a checkpoint without one, name the network and the file by -m and -c"


def require_run(folder: Path, where: str = "", advice: str = ELSE) -> None:
    """Refuse a path that is not a run folder; `where` and `advice` stand around the reason."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{where}{folder} is not a run folder: it has no config.yaml{advice}")


def require_path(path: str | Path) -> None:
    """Refuse a run folder or file that does not exist."""
    if not Path(path).exists():
        raise UserError(f"run folder or file {path} does not exist")


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested mapping of a YAML file, over that of its `_BASE_` file or files.

    Numbers and truth values in it are still :class:`Written`; `coerce` makes values of them.
    """
    return _read_yaml(path, (), count(1), [])


def read_layers(path: Path) -> Layers:
    """The files of a config, and what each sets itself."""
    layers: Layers = []
    _read_yaml(path, (), count(1), layers)
    return layers


def _read_yaml(
    path: Path, chain: tuple[Path, ...], reads: Iterator[int], layers: Layers
) -> dict[str, Any]:
    path = find_config(path)
    resolved = path.resolve()
    if resolved in chain:
        raise UserError(f"{path}: _BASE_ leads back to itself ({' -> '.join(map(str, chain))})")
    if next(reads) > _MOST_FILES:
        raise UserError(f"{path}: _BASE_ reads more than {_MOST_FILES} files")
    try:
        table = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} is not a config (expected sections of KEY: VALUE)")
    bases = table.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _BASE_ must name a file or a list of files, got {shown(bases)}")
    resolve_paths(table, path.parent)
    merged: dict[str, Any] = {}
    for base in bases:
        sibling = path.parent / base
        file = sibling if isfile(sibling) else Path(base)  # "configs/..." works from anywhere
        merged = overlay(merged, _read_yaml(file, (*chain, resolved), reads, layers))
    layers.append((resolved, dict(table)))
    imports = [*merged.get("IMPORTS", []), *table.pop("IMPORTS", [])]
    return overlay(merged, {**table, "IMPORTS": imports} if imports else table)


def resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make the files that a config names relative to itself absolute, in place."""
    table.update({key: as_text(table[key]) for key in ("IMPORTS", "FORK") if key in table})
    if table.get("IMPORTS"):
        table["IMPORTS"] = resolve_imports(table["IMPORTS"], folder)
    fork = table.pop("FORK", None)
    if fork is not None:
        table["IMPORTS"] = [resolve_fork(fork, folder), *(table.get("IMPORTS") or [])]
    resolve_teachers(table.get("DISTILLER"), folder)


def resolve_teachers(settings: Any, folder: Path) -> None:
    """:func:`resolve_paths` for a section DISTILLER: the configs that train teachers."""
    settings = settings if isinstance(settings, dict) else {}
    several = settings.get("TEACHERS")
    entries = [entry for entry in several if isinstance(entry, dict)] if several else []
    for node, key in [(settings, "TEACHER_CFG"), *((entry, "CFG") for entry in entries)]:
        if isinstance(node.get(key), str) and isfile(folder / node[key]):
            node[key] = str((folder / node[key]).resolve())


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def resolve_imports(names: Any, folder: Path) -> list[str]:
    """IMPORTS with files as absolute paths: beside the config that names them, or in the cwd.

    Raises:
        UserError: a file is not there, or `names` is not a list of names.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)):
        raise UserError(f"IMPORTS must be a list of files or modules, got {shown(names)}")
    resolved = []
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"IMPORTS must name files or modules, got {shown(name)}")
        if name.endswith("/"):
            name = f"{_find_folder(name, folder)}/"
        elif name.endswith(".py"):
            places = list(dict.fromkeys([folder / name, Path(name)]))
            file = next((place for place in places if isfile(place)), None)
            if file is None:
                raise UserError(
                    f"IMPORTS: no file {' or '.join(shown(str(place))[1:-1] for place in places)}"
                )
            name = str(file.resolve())
        resolved.append(name)
    return resolved


def resolve_fork(name: Any, folder: Path) -> str:
    """The FORK of a config as its entry of IMPORTS; relative to the config, else to the cwd."""
    if not isinstance(name, str) or not name.strip("/") or "\0" in name:
        raise UserError(f"FORK must be the folder of a fork, got {shown(name)}")
    return resolve_imports([f"{name.rstrip('/')}/"], folder)[0]


def _find_folder(name: str, folder: Path) -> Path:
    places = list(dict.fromkeys([folder / Path(name).expanduser(), Path(name)]))
    fork = next((place for place in places if isdir(place)), None)
    if fork is None:
        raise UserError(f"FORK: no folder {' or '.join(shown(str(p))[1:-1] for p in places)}")
    return fork.resolve()
