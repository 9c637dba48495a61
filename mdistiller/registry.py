"""Name -> object tables with decorators, and the error type that users see as one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")
USER_MODULE = "._user_"
"""Part of the name under which a file of the user's is imported."""


class UserError(ValueError):
    """Input that cannot work. Its text is the one line a user needs: what, where, what to do."""


class UnknownNameError(UserError, KeyError):
    """A name that is not in a table; the text offers the nearest and the known ones."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggest(name: str, known: Iterable[str]) -> str:
    """Text that names the nearest of `known`, for the end of an error message; may be empty."""
    by_fold = {candidate.casefold(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    return f"; did you mean {by_fold[nearest[0]]!r}?" if nearest else ""


def _described(item: Any) -> str:
    """Where an entry comes from, without the address that `repr` may print."""
    item = getattr(item, "constructor", item)
    if not hasattr(item, "__qualname__"):
        return f"an object of {type(item).__name__}"
    return f"{item.__qualname__} of {item.__module__}"


def is_builtin(item: Any) -> bool:
    """Whether a class or function is of this package, not of a user's file or fork."""
    module = getattr(item, "__module__", None) or ""
    return module.startswith("mdistiller.") and USER_MODULE not in module


class Registry(dict[str, Any]):
    """A dict from name to object that is filled by decorators.

    Args:
        kind: what the entries are, in the singular, for messages ("distiller", "data set").
        elsewhere: names that other projects use, in capitals, and what to set here in their place.
    """

    def __init__(self, kind: str, elsewhere: Mapping[str, str] = MappingProxyType({})):
        super().__init__()
        self.kind, self.elsewhere = kind, elsewhere
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
        """Enter `item` under `name`; see :meth:`register`.

        A user's class takes the place of one of this package. It declares its own defaults, or
        inherits those of the class that it derives from.
        """
        taken = self.get(name, item)
        if taken is not item:
            if is_builtin(item) or not is_builtin(taken):
                raise UserError(
                    f"{self.kind} {name!r} is taken by {_described(taken)}; choose another name"
                )
            if not (isinstance(item, type) and issubclass(item, taken)):
                self.config.pop(name, None)
        self[name] = item
        if config is not None:
            self.config[name] = config

    def __missing__(self, name: str) -> Any:
        names = ", ".join(sorted(self, key=str.casefold))
        instead = self.elsewhere.get(str(name).upper())
        advice = f"; set {instead}" if instead else suggest(str(name), self)
        raise UnknownNameError(f"unknown {self.kind} {name!r}{advice} (known: {names})")
