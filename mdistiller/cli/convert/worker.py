"""The part of convert_checkpoint that touches the file: a program of its own, `IN OUT shells|run`.

With `shells`, every class or function that the file names, but for torch's own ways to make a
tensor and numpy's to make an array, is replaced by an empty shell: nothing of the file can run.
With `run` it is unpickled as it is. Imports nothing of the package: it is started apart from it.
"""

from __future__ import annotations

import argparse
import collections
import numbers
import pickle
import sys
import types
import warnings
import zipfile
from typing import Any

import numpy as np
import torch

_SCALAR = np.float64(0).__reduce__()[0]
_ARRAY = np.zeros(1).__reduce__()[0]


def _encoded(text: str, encoding: str) -> bytes:
    """How old pickle protocols keep bytes; other encodings are nothing that numpy writes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(encoding)
    return text.encode(encoding)


_REAL: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
}
_TENSORS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
_DEEPEST = 100


class ShardedError(Exception):
    """A tensor that the file has a part of."""


def _wrapped() -> None:
    """Stands for torch's way to make a tensor that wraps others, a DTensor say."""


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a class of its own, as the plain tensor that it is or wraps."""
    if function is not _wrapped:
        return function(*arguments)
    parts = [part for part in (state if isinstance(state, tuple) else [state]) if part]
    local = next((part["_local_tensor"] for part in parts if "_local_tensor" in part), None)
    size = tuple(arguments[2])
    if not isinstance(local, torch.Tensor):
        return Shell()
    if tuple(local.shape) != size:
        raise ShardedError(f"{list(local.shape)} of {list(size)}")
    return local


class Shell:
    """Stands for anything: takes every argument and state, and does nothing with them."""

    items: dict[Any, Any]
    dump_patches = False  # torch asks this of the class of a network

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        made = super().__new__(cls)
        made.items = {}
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Shell:
        return Shell()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append


class Unpickler(pickle.Unpickler):
    """Knows tensors; all else is a shell."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REAL:
            return _REAL[module, name]
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _of_type
        if (module, name) == ("torch._utils", "_rebuild_wrapper_subclass"):
            return _wrapped
        if module == "torch._utils" and name in _TENSORS:
            return getattr(torch._utils, name)
        if module == "torch" and (name.endswith("Storage") or name in _dtypes()):
            return getattr(torch, name)
        return type("Shell", (Shell,), {})


def _dtypes() -> set[str]:
    return {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


def _load(file: Any, **options: Any) -> Any:
    return Unpickler(file, **options).load()


def _items(parts: Any, key: str) -> list[tuple[Any, Any]]:
    table = parts.get(key)
    return list(table.items()) if isinstance(table, dict) else []


def module_state(module: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of a module, or of a shell of one, from its attributes."""
    parts = vars(module)
    state: dict[str, torch.Tensor] = {}
    skipped = parts.get("_non_persistent_buffers_set")
    hidden = skipped if isinstance(skipped, set) else ()
    for name, value in (*_items(parts, "_parameters"), *_items(parts, "_buffers")):
        if isinstance(value, torch.Tensor) and name not in hidden:
            state[f"{prefix}{name}"] = value.detach()
    for name, child in _items(parts, "_modules"):
        if hasattr(child, "__dict__"):
            state.update(module_state(child, f"{prefix}{name}."))
    return state


def script_state(module: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of a shell of a TorchScript module, which has all as plain attributes."""
    state: dict[str, torch.Tensor] = {}
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            state[f"{prefix}{name}"] = value.detach()
        elif isinstance(value, Shell):
            state.update(script_state(value, f"{prefix}{name}."))
    return state


def _without_code(source: str, target: str) -> bool:
    """Copy a TorchScript file without what makes torch.load run it; False if it is of other kind.

    What is left is an ordinary file of a pickle and its tensors.
    """
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as old:
        if not any(name.endswith("/constants.pkl") for name in old.namelist()):
            return False
        with zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                if name.endswith(("/data.pkl", "/version", "/byteorder")) or "/data/" in name:
                    new.writestr(name, old.read(name))
    return True


def plain(value: Any, depth: int = 0) -> Any:
    """`value` made of tensors, mappings, lists and plain values; None for anything else."""
    if depth > _DEEPEST:
        return None
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "bif" or value.dtype.itemsize > 8:  # not all others are torch's
            return None
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return value
    if isinstance(value, collections.abc.Mapping):
        keys = (int, str)
        return {k: plain(v, depth + 1) for k, v in value.items() if isinstance(k, keys)}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    attributes = getattr(value, "__dict__", {})
    if "_parameters" in attributes and "_modules" in attributes:
        return module_state(value)
    if isinstance(value, (Shell, argparse.Namespace)):
        items = {**attributes, **attributes.get("items", {})}
        items.pop("items", None)
        return plain(items, depth + 1)
    return None


def main(source: str, target: str, mode: str) -> None:
    """Read `source`, write what is plain in it to `target`."""
    script = mode == "shells" and _without_code(source, f"{target}.plain")
    inert = types.SimpleNamespace(__name__="inert", Unpickler=Unpickler, load=_load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the source of shells
        contents = torch.load(
            f"{target}.plain" if script else source,
            map_location="cpu",
            weights_only=False,  # the point of this program
            pickle_module=pickle if mode == "run" else inert,
        )
    result = {"model": script_state(contents)} if script else plain(contents)
    if isinstance(contents, torch.jit.ScriptModule):
        result = {"model": dict(contents.state_dict())}
    elif hasattr(contents, "_parameters"):
        result = {"model": result}
    torch.save(result, target)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ShardedError as error:
        sys.exit(f"sharded: {error}")
