"""YAML that is plain values, of bounded size, each key once."""

from __future__ import annotations

from typing import Any

import yaml

LIMIT = 256 * 1024  # characters of a file
NODES = 20_000  # values of a file, those behind an alias counted as often as it is used
DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                where = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {where}: {shown(key)} is no config key")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def parse_yaml(text: str) -> Any:
    """The plain values that a YAML text spells.

    Raises:
        ValueError: it is no YAML, or too large, also by aliases of aliases; the text says why.
    """
    if len(text) > LIMIT:
        raise ValueError(f"it has {len(text)} characters, at most {LIMIT} are read")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    except Exception as error:  # constructors of dates, numbers and bytes raise many kinds
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Values below a node, aliases followed, and checked before anything is built of them."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.YAMLError("an alias leads back to itself")
        return size
    if depth > DEPTH:
        raise RecursionError
    known[id(node)] = None
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    total = 1 + sum(_size(child, known, depth + 1) for child in children)
    if total > NODES:
        raise yaml.YAMLError(f"its aliases spell more than {NODES} values")
    known[id(node)] = total
    return total


def shown(value: Any, longest: int = 120) -> str:
    """The repr of a value for an error: one line, not too long."""
    try:
        text = repr(value)
    except ValueError:  # of an integer of thousands of digits
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= longest else f"{text[: longest - 30]}...{text[-20:]}"
