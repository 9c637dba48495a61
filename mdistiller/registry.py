"""Name -> object tables with decorators, and the error type that users see as one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Input that cannot work. Its text is the one line a user needs: what, where, what to do."""


class UnknownNameError(UserError, KeyError):
    """A name that is not in a table; the text offers the nearest and the known ones."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def suggest(name: str, known: Iterable[str]) -> str:
    """Text that names the nearest of `known`, for the end of an error message; may be empty."""
    by_fold = {candidate.casefold(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    return f"; did you mean {by_fold[nearest[0]]!r}?" if nearest else ""


class Registry(dict[str, Any]):
    """A dict from name to object that is filled by decorators.

    Args:
        kind: what the entries are, in the singular, for messages ("distiller", "data set").
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.config: dict[str, dict[str, Any]] = {}

    def register(self, name: str, *, config: dict[str, Any] | None = None) -> Callable[[T], T]:
        """Decorator that enters an object under `name`, with its config defaults if it has any.

        Raises:
            ValueError: the name is taken by another object.
        """

        def enter(item: T) -> T:
            self.add(name, item, config=config)
            return item

        return enter

    def add(self, name: str, item: Any, *, config: dict[str, Any] | None = None) -> None:
        """Enter `item` under `name`; see :meth:`register`."""
        if name in self and self[name] is not item:
            raise UserError(f"{self.kind} {name!r} is taken by {self[name]!r}; choose another name")
        self[name] = item
        if config is not None:
            self.config[name] = config

    def __missing__(self, name: str) -> Any:
        known = ", ".join(sorted(self, key=str.casefold))
        raise UnknownNameError(
            f"unknown {self.kind} {name!r}{suggest(str(name), self)} (known: {known})"
        )
