"""Wrong keys and names and missing files, found before torch is imported.

`stored_defaults.json` holds the defaults of every method and data set, and the names of methods and
networks; a test holds it to the code
(`PYTHONPATH=.:tests python tests/config/test_early.py` writes it). Configs with user code
are left to the full check.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.config.node import ConfigNode, fill
from mdistiller.registry import Registry

STORED = Path(__file__).with_name("stored_defaults.json")


class _UserCodeError(Exception):
    """The config names user code, whose keys are not stored."""


class StoredConfig(ConfigNode):
    """A config whose defaults come from the stored file."""

    def import_user_code(self, modules: list[str]) -> None:
        raise _UserCodeError


def stored_config(kind: str) -> StoredConfig:
    """The defaults of "train" or "train_detection"; a section that is null takes any key."""

    def node(values: dict[str, Any]) -> StoredConfig:
        cfg = StoredConfig()
        for key, value in values.items():
            empty = StoredConfig(new_allowed=True) if value is None else value
            cfg[key] = node(value) if isinstance(value, dict) else empty
        return cfg

    return node(json.loads(STORED.read_text())[kind])


def check_early(
    path: str | Path, overrides: Sequence[str], imports: Sequence[str], kind: str = "train"
) -> None:
    """Refuse a config that the full check would refuse, unless torch is imported already.

    Raises:
        UserError: as `load_config` raises it.
    """
    if "mdistiller.distillers" not in sys.modules:
        check(path, overrides, imports, kind)


def check(
    path: str | Path, overrides: Sequence[str], imports: Sequence[str] = (), kind: str = "train"
) -> None:
    """:func:`check_early`, whatever is imported."""
    with contextlib.suppress(_UserCodeError):
        fill(stored_config(kind), path, overrides, imports)


def stored_names(which: str) -> Registry:
    """The names of a registry without its entries: "distillers", "releases", "zoos", "libraries",
    or a zoo's networks by the name of the zoo."""
    kind, names, elsewhere = json.loads(STORED.read_text())["names"][which]
    registry = Registry(kind, elsewhere)
    registry.update(dict.fromkeys(names))
    return registry


def check_names(networks: Sequence[str], zoo: str, methods: Sequence[str] = ()) -> None:
    """Refuse networks and methods that are not registered, unless torch is imported already.

    Raises:
        UserError: as `get_model_entry` and `get_distiller` raise it.
    """
    if "mdistiller.models" in sys.modules:
        return
    stored_names("zoos")[zoo]
    zoos, libraries, distillers = map(stored_names, (zoo, "libraries", "distillers"))
    for name in networks:
        library, slash, _ = name.partition("/")
        libraries[library] if slash else zoos[name]
    for part in (part.strip() for name in methods for part in name.split("+")):
        distillers[part]
