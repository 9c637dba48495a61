"""Values of a config: what they may be, and how text and YAML become them."""

from __future__ import annotations

import ast
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from mdistiller.config.network_lists import NETWORK_LISTS, read_networks
from mdistiller.config.safe_yaml import Written, shown
from mdistiller.preprocessing import read_image_size
from mdistiller.registry import UserError

DEEPEST = 20
"""Sections or lists within one another."""
_NAMES = "DATASET.CLASSES"
_LONGEST = 20_000  # characters of a value on the command line
_MOST_SIGNS = 2_000  # brackets and signs in it


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a config keeps a value: text, numbers (whole ones of 64 bits), nests of such."""
    if depth > DEEPEST:
        return False
    if isinstance(value, (list, tuple)):
        return all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (float, str))


def coerce(value: Any, default: Any, name: str, fractions: bool = False) -> Any:
    """`value` as the type of `default`; ints become floats, lists and tuples interchange.

    Args:
        fractions: take 2.5 where the default is a whole number, and keep 2.0 a float: the default
            is a user's, who may have written 4 and meant 4.0.
    """
    value = as_read(value, default, name)
    if name in _READERS:
        return _READERS[name](literal(value, name), name)
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and is_plain(value):
            return str(value)
        raise UserError(f"{name} must be text, got {shown(value)}")
    value = literal(value, name)
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = fits and is_plain(value) and math.isfinite(value)
        value = float(value) if fits else value
    elif isinstance(default, int):
        if fractions and isinstance(value, float):
            return coerce(value, float(default), name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int) and not isinstance(value, bool) and is_plain(value)
    elif isinstance(default, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and _items_fit(value, default, fractions)
        value = type(default)(value) if fits else value
    else:
        fits = True
    if not fits:
        raise UserError(f"{name} must be {_describe(default)}, got {shown(value)}")
    return value


def as_read(value: Any, default: Any, name: str, depth: int = 0) -> Any:
    """What a file spells for a key: the written text where `default` is text, else the value.

    Raises:
        UserError: a number is spelled in a way that YAML and people read differently.
    """
    if isinstance(value, Written):
        is_text = isinstance(default, str) and (name not in _READERS or name == _NAMES)
        return value.text if is_text else value.number(name)
    if depth > DEEPEST:  # refused later
        return value
    if isinstance(value, (list, tuple)):
        texts = isinstance(default, (list, tuple)) and {type(item) for item in default} == {str}
        texts |= name == _NAMES
        items = [as_read(item, "" if texts else None, name, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {k: as_read(v, None, f"{name}.{k}", depth + 1) for k, v in value.items()}
    return value


def check_norm(value: Any, name: str) -> Any:
    """`value` if it names a normalisation, or is a mean and a std of three channels."""
    if value in ("auto", "data", "own"):
        return value
    statistics = read_statistics(value)
    if statistics is not None:
        return statistics
    raise UserError(
        f"{name} must be auto, data, own or [[mean], [std]] with a value a channel each up to 1 "
        f"(images in [0, 1]), those of std above 0, got {shown(value)}"
    )


def read_statistics(value: Any) -> list[list[float]] | None:
    """`value` as [mean, std] of 1, 3 or 4 channels, for images in [0, 1]; None if it is not."""
    pair = value if isinstance(value, (list, tuple)) and len(value) == 2 else ()
    rows = [row for row in pair if isinstance(row, (list, tuple)) and len(row) in (1, 3, 4)]
    numbers = all(type(x) in (int, float) for row in rows for x in row)
    if len(rows) == 2 and len(rows[0]) == len(rows[1]) and numbers:
        mean, std = ([float(x) for x in row] for row in rows)
        if all(map(math.isfinite, mean + std)) and max(mean + std) <= 1 and min(std) > 0:
            return [mean, std]
    return None


def _image_size(value: Any, name: str) -> int | list[int]:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        size = read_image_size(value)
    except ValueError:
        raise UserError(
            f"{name} must be a side in pixels or [height, width], got {shown(value)}"
        ) from None
    return size if isinstance(size, int) else list(size)


def _weights_or_word(value: Any, name: str) -> list[float] | str:
    if value in ("none", "inverse"):
        return str(value)
    numbers = isinstance(value, (list, tuple)) and all(type(x) in (int, float) for x in value)
    if numbers and all(0 <= x < math.inf for x in value) and any(value):
        return [float(x) for x in value]
    raise UserError(
        f"{name} must be none, inverse or a list of one weight for each class, none negative, got "
        f"{shown(value)}"
    )


def _switch_or_text(value: Any, name: str) -> bool | str:
    value = {"true": True, "false": False}.get(str(value).lower(), value)
    if not isinstance(value, (bool, str)):
        raise UserError(f"{name} must be True, False or text, got {shown(value)}")
    return value


def _names_or_text(value: Any, name: str) -> list[str] | str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(type(item) in (str, int) for item in value):
        return [str(item) for item in value]
    raise UserError(f"{name} must be a list of names, or text, got {shown(value)}")


_READERS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("DISTILLER.TEACHER_NORM", "DISTILLER.STUDENT_NORM"), check_norm),
    **dict.fromkeys(NETWORK_LISTS, functools.partial(read_networks, check_norm=check_norm)),
    **dict.fromkeys(("DATASET.IMAGE_SIZE", "DISTILLER.TEACHER_SIZE"), _image_size),
    "DISTILLER.CLASS_WEIGHTS": _weights_or_word,
    _NAMES: _names_or_text,
    "SOLVER.COMPILE": _switch_or_text,
}
"""Keys whose values are of several types: (value, key) -> the value, checked."""


def _items_fit(items: Sequence[Any], default: Sequence[Any], fractions: bool = False) -> bool:
    allowed = {type(item) for item in default} or {int, float, str}
    allowed |= {int} if float in allowed else set()
    allowed |= {float} if fractions and int in allowed else set()
    return all(type(item) in allowed and is_plain(item) and item == item for item in items)


def _describe(default: Any) -> str:
    if isinstance(default, bool):
        return "True or False"
    if isinstance(default, int):
        return "a whole number"
    if isinstance(default, float):
        return "a finite number"
    return f"a list like {list(default)}" if default else "a list"


def literal(value: Any, name: str = "") -> Any:
    """Text as the Python literal it spells, if it spells one ("1e-3", "[1, 2]"); else unchanged.

    What has 1_000 or 0o17 in it stays text, as in a file: 2024_11_29 is not a number.

    Raises:
        UserError: a text too long, or nested too deep, to be looked at.
    """
    if not isinstance(value, str):
        return value
    if len(value) > _LONGEST or sum(map(value.count, "([{-+~")) > _MOST_SIGNS:
        raise UserError(f"{name or 'a value'} is too long or too deeply nested: {shown(value)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange escapes in what is meant as text
            text = value.lstrip(" \t")
            tree = ast.parse(text, mode="eval")
            return value if _has_odd_number(tree, text) else ast.literal_eval(tree)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


def _has_odd_number(tree: ast.AST, text: str) -> bool:
    """Whether a number in `text` is octal or has underscores."""
    if "_" not in text and "0o" not in text.lower():
        return False
    numbers = [
        ast.get_source_segment(text, node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, complex))
    ]
    return any("_" in number or "0o" in number.lower() for number in numbers)


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values below a node."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def lookup(cfg: CfgNode, name: str) -> Any:
    """The node or value with a dotted name."""
    for part in name.split("."):
        cfg = cfg[part]
    return cfg
