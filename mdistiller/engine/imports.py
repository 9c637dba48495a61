"""User code named by a config: `IMPORTS: ["my_method.py", "my_package.models"]`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mdistiller.distillers import adopt
from mdistiller.registry import UserError


def import_user_modules(names: list[str], folder: Path | None = None) -> None:
    """Import files and modules, so that they register what they define; each once.

    A file is looked for in the working directory, then beside the config that names it. It may use
    the relative imports of a file in `mdistiller/distillers/`.

    Raises:
        UserError: a file or module is not there, or it fails while it is imported.
    """
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"IMPORTS wants names of files or modules, got {name!r}")
        try:
            module = _import_file(name, folder) if name.endswith(".py") else _import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"IMPORTS: {name} fails when imported: {type(error).__name__}: {error}"
            ) from error
        adopt(module)


def _import_file(name: str, folder: Path | None) -> ModuleType:
    places = [Path(name), *([folder / name] if folder else [])]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        looked = " or ".join(str(place) for place in places)
        raise UserError(f"IMPORTS: no file {looked}")
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    # The parent package makes `from ._base import Distiller` mean what it means over there.
    full_name = f"mdistiller.distillers._user_{path.stem}_{digest}"
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
