"""YAML of plain values, each key once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from mdistiller.registry import UserError

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = re.compile(r"[-+]?0[0-7]+|.*[_:].*")  # octal; thousands marked by _, base 60


@dataclass(frozen=True)
class Written:
    """A number or truth value of a file.

    Attributes:
        value: what YAML 1.1 makes of it: 8 of 010, 90 of 1:30, False of no.
        text: how it is written.
        where: file and line.
    """

    value: bool | int | float
    text: str
    where: str

    def __repr__(self) -> str:
        return self.text

    def number(self, name: str) -> bool | int | float:
        """The value.

        Raises:
            UserError: people and YAML read the text as different numbers.
        """
        if _AMBIGUOUS.fullmatch(self.text):
            raise UserError(
                f"{self.where}: {name}: YAML reads {self.text} as {shown(self.value)}; write the "
                "number without leading zeros, _ and :, or quotes around it if it is text"
            )
        return self.value


def as_text(value: Any) -> Any:
    """A value of a file, or each in a list, as it is written."""
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return value.text if isinstance(value, Written) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice; dates and `=` are text."""

    source = ""  # the file, for errors

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                where = key_node.start_mark.line + 1
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else shown(key)
                raise yaml.YAMLError(f"line {where}: {text} is not a config key")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


_Loader.yaml_implicit_resolvers = {
    sign: [pair for pair in pairs if pair[0] not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for sign, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _WrittenLoader(_Loader):
    """Reads numbers and truth values as :class:`Written`."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, (bool, int, float)) and isinstance(node, yaml.ScalarNode):
            line = f"line {node.start_mark.line + 1}"
            return Written(value, node.value, f"{self.source}, {line}" if self.source else line)
        return value


def parse_yaml(text: str, source: str | None = None) -> Any:
    """The plain values that a YAML text spells.

    Args:
        source: the file; if it is given, numbers and truth values come as :class:`Written`.

    Raises:
        ValueError: it is not valid YAML, or nested too deeply.
    """
    loader = None
    try:
        loader = _Loader(text) if source is None else _WrittenLoader(text)
        loader.source = source or ""
        return loader.get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # constructors of dates, numbers and bytes raise many kinds
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def shown(value: Any, longest: int = 120) -> str:
    """The repr of a value for an error: one line, not too long."""
    try:
        text = repr(value)
    except ValueError:  # of an integer of thousands of digits
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= longest else f"{text[: longest - 30]}...{text[-20:]}"
