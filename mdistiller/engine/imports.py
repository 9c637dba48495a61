"""User code named by a config: `IMPORTS: ["my_method.py", "my_package.models"]`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mdistiller.distillers import adopt
from mdistiller.engine.safe_yaml import shown
from mdistiller.registry import UserError


def resolve_imports(names: Any, folder: Path) -> list[str]:
    """IMPORTS with files as absolute paths: beside the config that names them, or in the cwd.

    Raises:
        UserError: a file is not there, or `names` is no list of names.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)):
        raise UserError(f"IMPORTS wants a list of files or modules, got {shown(names)}")
    resolved = []
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"IMPORTS wants names of files or modules, got {shown(name)}")
        if name.endswith(".py"):
            places = list(dict.fromkeys([folder / name, Path(name)]))
            found = next((place for place in places if is_file(place)), None)
            if found is None:
                raise UserError(
                    f"IMPORTS: no file {' or '.join(shown(str(place))[1:-1] for place in places)}"
                )
            name = str(found.resolve())
        resolved.append(name)
    return resolved


def import_user_modules(names: list[str]) -> None:
    """Import files and modules, as :func:`resolve_imports` gives them, each once.

    What they define registers itself. A file may use the relative imports of a file in
    `mdistiller/distillers/`.

    Raises:
        UserError: one fails while it is imported.
    """
    for name in names:
        try:
            adopt(_import_file(Path(name)) if name.endswith(".py") else _import_module(name))
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"IMPORTS: {shown(name)[1:-1]} fails when imported: {reason}"
            ) from error


def is_imported(name: str) -> bool:
    """Whether a file or module has been imported in this process already."""
    return (_module_name(Path(name)) if name.endswith(".py") else name) in sys.modules


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too for what can be no name of one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _module_name(path: Path) -> str:
    """The parent package makes `from ._base import Distiller` mean what it means over there."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return f"mdistiller.distillers._user_{path.stem}_{digest}"


def _import_file(path: Path) -> ModuleType:
    full_name = _module_name(path)
    if full_name in sys.modules:
        return sys.modules[full_name]
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)
