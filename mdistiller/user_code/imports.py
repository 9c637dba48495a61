"""User code named by a config: `IMPORTS: ["my_method.py", "my_package.models", "my_fork/"]`.

A folder, with a slash behind it, is a fork of the original library: `forks.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mdistiller.config.safe_yaml import shown
from mdistiller.distillers import DISTILLERS, register_module
from mdistiller.registry import USER_MODULE, UserError
from mdistiller.user_code.forks import (
    LOADED,
    UserCode,
    around,
    import_method,
    keep,
    load_fork,
    put_in_force,
    report,
    snapshot,
)


def import_user_modules(names: list[str]) -> list[UserCode]:
    """Import files, modules and forks, as :func:`resolve_imports` gives them, each once.

    What they define registers itself. A file may use the relative imports of a file in
    `mdistiller/distillers/`. Of a class in the place of one of the library's a line is printed.

    Returns:
        What each has given that has an effect on the defaults.

    Raises:
        UserError: one fails while it is imported.
    """
    given = []
    for name in names:
        try:
            given.append(load_fork(name) if name.endswith("/") else _load(name))
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"IMPORTS: {shown(name)[1:-1]} fails when imported: {reason}"
            ) from error
    return given


def _load(name: str) -> UserCode:
    """Import a file or module once, and register what it holds."""
    if name in LOADED:
        return put_in_force(name)
    before = snapshot()
    defaults: Mapping[str, Any] = {}
    place = around(Path(name)) if name.endswith(".py") else None
    if place is not None:
        module, defaults = import_method(Path(name), place)
    else:
        module = _import_file(Path(name)) if name.endswith(".py") else _import_module(name)
    register_module(module)
    earlier = before[0][0]
    taken = [method for method in DISTILLERS if method not in earlier]
    replaced = [m for m in earlier if DISTILLERS[m] is not earlier[m]]
    for method in (*taken, *replaced):
        if method in defaults and method not in DISTILLERS.config:
            DISTILLERS.config[method] = defaults[method]
    report(name, before, only_replaced=place is None)
    sections = {m: DISTILLERS.config[m] for m in replaced if m in DISTILLERS.config}
    keep(UserCode(name, sections, tuple(replaced)), before, only_replaced=True)
    return put_in_force(name)


def is_imported(name: str) -> bool:
    """Whether a file, a module or a fork has been imported in this process already."""
    module = _module_name(Path(name)) if name.endswith(".py") else name
    return name in LOADED or (not name.endswith("/") and module in sys.modules)


def _module_name(path: Path) -> str:
    """The parent package makes `from ._base import Distiller` mean what it means over there."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return f"mdistiller.distillers{USER_MODULE}{path.stem}_{digest}"


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
