"""Reading of files that hold weights: clear errors, and no code of theirs is run."""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.manifest import check_file
from mdistiller.registry import UserError

State = Mapping[str, Tensor]


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The contents of a checkpoint file, on the CPU; only tensors and plain values are read.

    Files of the original library, which hold numpy scalars, are read as well. A safetensors file
    gives `{"model": state}`, and with it "norm" if its metadata say `mean` and `std`, and "data" if
    they say `classes`.

    Raises:
        UserError: the file is missing, truncated, not what the manifest of its run lists, or holds
            something else.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; name a file in it (student_best, say)")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {path} is empty")
    check_file(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    _refuse_bomb(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_safe_globals()):
            warnings.simplefilter("ignore")  # about pickles of other protocols, which then fail
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            name = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
            raise RefusedError(
                f"checkpoint {path} is refused: it holds more than weights and plain values"
                f"{f' ({name[1]})' if name else ''}, which could run code when read; "
                f"tools/convert_checkpoint.py {path} NEW takes its weights out"
            ) from None
        raise UserError(f"checkpoint {path} is truncated, damaged or no PyTorch file") from None


class RefusedError(UserError):
    """A checkpoint that would have to run code to be read."""


def _refuse_bomb(path: Path) -> None:
    """Refuse a zip file that would unpack to far more than it is: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as file:
            total = sum(info.file_size for info in file.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # of the old format, or damaged
    if total > 4 * path.stat().st_size + (1 << 20):
        raise UserError(
            f"checkpoint {path} is refused: its {path.stat().st_size} bytes unpack to {total}"
        )


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package safetensors: pip install mdistiller[export]"
        ) from error
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            facts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or no safetensors file") from error
    contents: dict[str, Any] = {"model": state}
    if {"mean", "std"} <= facts.keys():
        contents["norm"] = [_json_or_text(facts[key]) for key in ("mean", "std")]
    if "classes" in facts:
        contents["data"] = {"classes": _json_or_text(facts["classes"])}
    return contents


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _safe_globals() -> list[Any]:
    """What files of the original hold beside tensors and only keeps values, running nothing.

    Numpy's numbers, under two module names, and the options of a command line.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}
    return [np.dtype, *kinds, *((scalar, name) for name in names), argparse.Namespace]


def network_state(contents: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of one network in what a checkpoint file holds.

    Understands `{"model": state}`, a bare state dict, the prefix of DataParallel, and the state of
    a whole distiller, of which the student is taken.
    """
    state = contents
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"checkpoint {path} holds no weights (want a state dict, or one as 'model')"
        )
    odd = next((k for k, v in state.items() if not (isinstance(k, str) and _is_dense(v))), None)
    if odd is not None:
        raise UserError(
            f"checkpoint {path} holds no plain state dict: {str(odd)[:80]!r} is no named tensor"
        )
    plain = strip_prefix(state, "module.")
    student = {k: v for k, v in plain.items() if k.startswith("student.")}
    return strip_prefix(student, "student.") if student else plain


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def strip_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """`state` without `prefix` before its keys, if all of them have it."""
    if all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def load_state(net: nn.Module, state: State, what: str) -> None:
    """`net.load_state_dict(state)`, strictly, with a one-line error; nothing is loaded on failure.

    Batch-norm counters, which very old files lack, may be missing.

    Args:
        what: how to call the file and the network in the error.
    """
    own = net.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)}, want {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(items)} {kind} ({', '.join(items[:2])}{', ...' if len(items) > 2 else ''})"
        for kind, items in (
            ("missing tensors", missing),
            ("unknown tensors", extra),
            ("tensors of another shape", shapes),
        )
        if items
    ]
    if problems:
        raise UserError(f"{what} do not fit together: {'; '.join(problems)}")
    fitting = OrderedDict({**{key: own[key] for key in counters}, **state})
    # Some layers (of MNASNet) refuse a state without its version.
    fitting._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
    net.load_state_dict(fitting)


def with_own_head(net: Any, state: State) -> dict[str, Tensor]:
    """`state` with the classifier of `net`, a StagedNet, in place of one for other classes."""
    layer = {id(param) for param in net.classifier().parameters()}
    own = {k: v for k, v in net.state_dict(keep_vars=True).items() if id(v) in layer}
    if any(k in state and state[k].shape[:1] != v.shape[:1] for k, v in own.items()):
        return {**state, **own}
    return dict(state)


def load_network(
    net: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    num_classes: int | None = None,
    new_head: bool = False,
) -> dict[str, Any]:
    """Load the weights of one network from a file.

    A student may have been trained with another head: the network takes on what the file holds of
    it, if it can (`accept_neck`).

    Args:
        name: the network's name, for errors.
        num_classes: classes of the data, to tell a wrong class count from a wrong architecture.
        new_head: keep the network's classifier where the file's is for other classes.

    Returns:
        What the file says beside weights, None where it does not: "norm", the [mean, std] that the
        network's images are normalised with; "data", of the data it was trained on.
    """
    contents = load_checkpoint(path)
    state = network_state(contents, path)
    if new_head:
        state = with_own_head(net, state)
    accept = getattr(net, "accept_neck", None)
    if accept is not None:
        accept(state)
    own = net.state_dict()
    differ = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    head = [k for k in list(own)[-2:] if k in state and state[k].ndim]
    if num_classes and differ and set(differ) <= set(head):
        raise UserError(
            f"checkpoint {path} is of a {name} for {state[head[-1]].shape[0]} classes, "
            f"but {num_classes} are wanted"
        )
    load_state(net, state, f"checkpoint {path} and network {name}")
    return {key: contents.get(key) if "model" in contents else None for key in ("norm", "data")}
