"""Safe reading of pickled numpy arrays, the format of detectron2's model zoo."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from mdistiller.registry import UserError


class _RefusedError(Exception):
    """The pickle names something other than what arrays need."""


class _Array:
    """Stands for the class of arrays in pickles; it cannot be instantiated."""

    def __new__(cls, *args: Any) -> _Array:
        raise _RefusedError("numpy.ndarray made by itself")


def _reconstruct(kind: type, shape: Any, code: Any) -> np.ndarray:
    """An array without elements, which pickle then gives its shape and bytes."""
    if kind is not _Array:
        raise _RefusedError("an array of another class")
    return np.empty(0, np.int8)


def _frombuffer(data: Any, dtype: np.dtype, shape: Any, order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order).copy()  # type: ignore[call-overload]


def _dtype(name: str, *rest: Any) -> np.dtype:
    if not re.fullmatch(r"[<>|=]?[fiub][1248]", str(name)):
        raise _RefusedError(f"the data type {str(name)[:20]!r}")
    return np.dtype(name, copy=True)


def _no_bytes() -> bytes:
    """How pickles of protocol 2 hold the bytes of an empty array."""
    return b""


def _encode(text: str, code: str = "latin1") -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if code != "latin1":
        raise _RefusedError(f"text in {code[:20]!r}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")
        for module, name, made in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"{module}.{name}"[:80])
        return _KNOWN[module, name]


def load_arrays(path: Path) -> Any:
    """The contents of a pickle of dicts, lists, texts, numbers and numpy arrays.

    Raises:
        UserError: it is missing, damaged, or names anything but what arrays need, which is not run.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except _RefusedError as error:
        raise UserError(
            f"{path} is refused: it holds {error}, which could run code when read; "
            "files of detectron2's model zoo hold arrays only"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path} is damaged or not a pickle of arrays") from error
