"""Lists of networks in a config: DISTILLER.TEACHERS and DISTILLER.PEERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mdistiller.config.safe_yaml import shown
from mdistiller.registry import UserError

NETWORK_LISTS: dict[str, dict[str, type]] = {
    "DISTILLER.TEACHERS": {"NAME": str, "CKPT": str, "CFG": str, "ARGS": dict, "WEIGHT": float},
    "DISTILLER.PEERS": {"NAME": str, "ARGS": dict},
}
"""The keys of an entry, by list, and their types; NORM is another one of both."""
_WORDS = {str: "text", dict: "a section", float: "a number"}

Entry = dict[str, Any]


def read_networks(value: Any, name: str, check_norm: Callable[[Any, str], Any]) -> list[Entry]:
    """The entries of a list of networks, each a mapping with NAME; a name alone makes one.

    Args:
        value: as a file or the command line gives it, where "a, b" are two names.
        check_norm: returns a NORM, or refuses it under its name.

    Raises:
        UserError: it is not such a list.
    """
    if isinstance(value, str) and "{" in value:
        raise UserError(
            f"{name} cannot be read: on the command line it is written with quotes, such as "
            f"\"[{{'NAME': 'resnet8'}}]\", got {shown(value)}"
        )
    if isinstance(value, str):
        value = [part.strip(" '\"") for part in value.strip(" []").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list of networks, got {shown(value)}")
    return [
        _read_entry(item, f"{name}[{number}]", NETWORK_LISTS[name], check_norm)
        for number, item in enumerate(value)
    ]


def _read_entry(
    item: Any, label: str, kinds: Mapping[str, type], check_norm: Callable[[Any, str], Any]
) -> Entry:
    keys = ", ".join([*kinds, "NORM"])
    item = {"NAME": item} if isinstance(item, str) else item
    if not isinstance(item, Mapping) or not item.get("NAME"):
        raise UserError(
            f"{label} must be a network's name or a section with NAME (keys: {keys}), got "
            f"{shown(item)}"
        )
    entry: Entry = {}
    for key, given in item.items():
        if key == "NORM":
            entry[key] = check_norm(given, f"{label}.NORM")
            continue
        if key not in kinds:
            raise UserError(f"unknown config key {label}.{key} (keys: {keys})")
        kind = kinds[key]
        given = float(given) if kind is float and type(given) is int else given
        if not isinstance(given, Mapping if kind is dict else kind):
            raise UserError(f"{label}.{key} must be {_WORDS[kind]}, got {shown(given)}")
        entry[key] = {**given} if isinstance(given, Mapping) else given
    if not 0 < entry.get("WEIGHT", 1.0) < float("inf"):
        raise UserError(f"{label}.WEIGHT must be positive, got {entry['WEIGHT']}")
    return entry
