"""Read files of weights, without running code from them, and load them into networks."""

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

from mdistiller import layouts
from mdistiller.files.manifest import check_file
from mdistiller.files.names import split_key
from mdistiller.registry import UserError
from mdistiller.runtime import rank

State = Mapping[str, Tensor]

_KINDS = {
    b"\x89HDF": "an HDF5 file (of Keras, say)",
    b"\x93NUMPY": "a NumPy array",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull gets the file itself)",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
    b"<": "a web page (of a download that failed, say)",
    b"{": "a JSON file",
}
"""First bytes of files that are taken for checkpoints, and what they are."""
GATHERING = (
    "save whole tensors in the program that trained it, by torch.distributed.checkpoint.state_dict."
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)),"
    " or make a file of a folder that torch.distributed.checkpoint saved, by python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
)
"""The conversion of a sharded checkpoint."""
FEATURES_ONLY = "it serves as a teacher of methods that read features alone (docs/methods.md)"
"""What the weights of a network for other classes are good for."""


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Load a checkpoint file to the CPU; only tensors and plain values are read.

    Files of the original library, which hold numpy scalars, are read as well. A safetensors file
    gives `{"model": state}`, with "norm" if its metadata have `mean` and `std`, and "data" if they
    have `classes` or `preprocessing`.

    Raises:
        UserError: the file is missing, truncated, not the one that its run's manifest lists, or not
            a checkpoint.
    """
    path, _ = split_key(path)
    if (path / ".metadata").is_file():
        raise UserError(f"checkpoint {path} is a folder of shards: {GATHERING}")
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
    _refuse_shards(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_safe_globals()):
            warnings.simplefilter("ignore")  # about pickles of other protocols, which then fail
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise _unreadable(path, str(error)) from None


class RefusedError(UserError):
    """A checkpoint that cannot be read without running code from it."""


def _unreadable(path: Path, reason: str) -> UserError:
    """The error for a file that torch.load does not read, by the text of its own error."""
    convert = f"tools/convert_checkpoint.py {path} NEW takes its weights out"
    if "TorchScript" in reason:
        return RefusedError(
            f"checkpoint {path} is a TorchScript program (torch.jit.save), not a state dict; "
            f"{convert}"
        )
    if re.search("unsupported (global|class)", reason, re.IGNORECASE):
        name = re.search(r"GLOBAL ([\w.]{1,80})", reason)
        return RefusedError(
            f"checkpoint {path} is refused: it holds more than weights and plain values"
            f"{f' ({name[1]})' if name else ''}, which could run code when read; {convert}"
        )
    start = path.read_bytes()[:32].lstrip()
    kind = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "")
    return UserError(
        f"checkpoint {path} is {kind}, not a PyTorch file"
        if kind
        else f"checkpoint {path} is truncated, damaged or not a PyTorch file"
    )


def _refuse_bomb(path: Path) -> None:
    """Refuse a zip bomb: torch.save does not compress, so the contents fit the file's size."""
    try:
        with zipfile.ZipFile(path) as file:
            total = sum(info.file_size for info in file.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # of the old format, or damaged
    if total > 4 * path.stat().st_size + (1 << 20):
        raise UserError(
            f"checkpoint {path} is refused: its {path.stat().st_size} bytes unpack to {total}"
        )


def _refuse_shards(path: Path) -> None:
    """Refuse a file of DTensors, which torch can read only if certain modules are imported."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith("/data.pkl")]
            sharded = any(b"torch.distributed.tensor" in file.read(name) for name in names)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return
    if sharded:
        raise RefusedError(
            f"checkpoint {path} holds DTensors, one process's shards (FSDP2): {GATHERING}; if its "
            f"tensors are whole, tools/convert_checkpoint.py {path} NEW takes them out"
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
        raise UserError(f"checkpoint {path} is damaged or not a safetensors file") from error
    contents: dict[str, Any] = {"model": state}
    if {"mean", "std"} <= facts.keys():
        contents["norm"] = [_json_or_text(facts[key]) for key in ("mean", "std")]
    data = {key: _json_or_text(facts[key]) for key in ("classes", "preprocessing") if key in facts}
    if data:
        contents["data"] = data
    return contents


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _safe_globals() -> list[Any]:
    """The classes in files of the original that are safe to unpickle: they only hold values.

    Numpy's numbers, under two module names, and the options of a command line.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}
    return [np.dtype, *kinds, *((scalar, name) for name in names), argparse.Namespace]


def network_state(
    contents: Any, path: str | os.PathLike[str], net: nn.Module | None = None
) -> dict[str, Tensor]:
    """Find the state dict of one network in a checkpoint's contents, at any depth.

    If there are several, the choice is printed; see :mod:`mdistiller.layouts` for the choice and
    for how keys are renamed to those of `net`.

    Args:
        path: for errors; FILE:KEY chooses one of several.
        net: the network to load it into, if known.

    Raises:
        UserError: there are no weights, or those of several networks without a preferred one.
    """
    file, key = split_key(path)
    states = layouts.find_states(contents)
    if not states:
        keys = ", ".join(str(k)[:40] for k in contents) if isinstance(contents, Mapping) else ""
        raise UserError(
            f"checkpoint {file} holds no weights (expected a state dict, or one under 'model')"
            f"{f'; its keys are {keys[:200]}' if keys else ''}"
        )
    odd = [place for place, state in states.items() if _odd_key(state)]
    plain = {place: state for place, state in states.items() if place not in odd}
    if not plain:
        raise UserError(
            f"checkpoint {file} is not a plain state dict: {_odd_key(states[odd[0]])} is not a "
            "named tensor"
        )
    expected = None if net is None else net.state_dict()
    aliases = getattr(net, "key_aliases", {})
    if key or expected is None:
        place, state = layouts.choose_state(plain, file, key)
    else:
        place, state = layouts.choose_fitting(plain, file, expected, aliases)
    others = [other or "the file itself" for other in states if other != place]
    if others and not key and not layouts.is_of_run(state) and rank() == 0:
        print(
            f"{file}: read {place or 'the file itself'}; {file}:KEY chooses another "
            f"({', '.join(others)})",
            flush=True,
        )
    return layouts.match_keys(state, expected, aliases)


def _odd_key(state: Mapping[Any, Any]) -> str:
    """The first key, as text, that is not a string or has no plain tensor; "" without one."""
    odd = (k for k, v in state.items() if not (isinstance(k, str) and _is_dense(v)))
    return next((repr(str(k)[:80]) for k in odd), "")


def not_finite(state: State, own: State) -> str:
    """Which tensor of `state` has NaN or Inf where that of a new network is finite; "" if none."""
    bad = [
        key
        for key, value in state.items()
        if value.is_floating_point()
        and not value.isfinite().all()
        and (key not in own or own[key].isfinite().all())
    ]
    if not bad:
        return ""
    what = "NaN" if any(state[key].isnan().any() for key in bad) else "infinite values"
    return f"has {what} in {len(bad)} of {len(state)} tensors (first: {bad[0]})"


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def strip_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Remove `prefix` from the keys of `state`, if all of them have it."""
    if all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def load_state(net: nn.Module, state: State, what: str) -> None:
    """`net.load_state_dict(state)`, strictly, with a one-line error; nothing is loaded on failure.

    Batch-norm counters, which very old files lack, may be missing.

    Args:
        what: name of file and network in the error.
    """
    expected = net.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = [key for key in expected if key not in state and key not in counters]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key} is {state[key].dtype}".replace("torch.", "")
        for key in expected
        if key in state
        and expected[key].is_floating_point()
        and state[key].ndim
        and not state[key].is_floating_point()
    ]
    problems = [
        f"{len(items)} {kind} ({', '.join(items[:2])}{', ...' if len(items) > 2 else ''})"
        for kind, items in (
            ("missing tensors", missing),
            ("unknown tensors", extra),
            ("tensors of another shape", shapes),
            ("tensors that are not floating-point", kinds),
        )
        if items
    ]
    if problems:
        raise UserError(f"{what} do not fit together: {'; '.join(problems)}")
    fitting = OrderedDict({**{key: expected[key] for key in counters}, **state})
    # Some layers (of MNASNet) refuse a state without its version.
    fitting._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined]
    net.load_state_dict(fitting)


def adapt_state(net: Any, state: State) -> dict[str, Tensor]:
    """`state`, or what the network's own `adapt_state` makes of it if it does not fit."""
    adapt, expected = getattr(net, "adapt_state", dict), net.state_dict()
    fits = all(key in state and state[key].shape == expected[key].shape for key in expected)
    return dict(state if fits else adapt(state))


def with_own_head(net: Any, state: State, headless: bool = False) -> dict[str, Tensor]:
    """Replace a classifier for other classes in `state` by that of `net`, a StagedNet.

    Args:
        headless: add the classifier also if `state` has none.
    """
    head = head_state(net)
    if any(k in state and state[k].shape[:1] != v.shape[:1] for k, v in head.items()):
        return {**state, **head}
    if headless and not head.keys() & state.keys():
        return {**state, **head}
    return dict(state)


def head_state(net: Any) -> dict[str, Tensor]:
    """The tensors of the classifier of `net`, a StagedNet, under their names in its state dict."""
    layer = {id(param) for param in net.classifier().parameters()}
    return {k: v for k, v in net.state_dict(keep_vars=True).items() if id(v) in layer}


def _refuse_other_head(
    net: Any, state: State, path: str | os.PathLike[str], name: str, num_classes: int | None
) -> None:
    """The errors for weights that differ in the classifier alone; arguments as of load_network."""
    expected = net.state_dict()
    differ = [k for k, v in expected.items() if k not in state or state[k].shape != v.shape]
    head = [k for k in list(expected)[-2:] if k in state and state[k].ndim]
    if num_classes and differ and set(differ) <= set(head):
        raise UserError(
            f"checkpoint {path} is of a {name} for {state[head[-1]].shape[0]} classes, "
            f"but {num_classes} are wanted; {FEATURES_ONLY}"
        )
    if differ and hasattr(net, "classifier") and set(differ) == set(head_state(net)):
        raise UserError(
            f"checkpoint {path} has no classifier of {name} ({', '.join(differ)} are missing); "
            f"{FEATURES_ONLY}"
        )


def load_network(
    net: Any,
    path: str | os.PathLike[str],
    name: str,
    num_classes: int | None = None,
    new_head: bool = False,
    headless: bool = False,
    diverged: bool = False,
) -> dict[str, Any]:
    """Load the weights of one network from a file.

    A student may have been trained with a neck (SimKD): the network adopts it if it can
    (`accept_neck`). A network may convert the file's position embeddings or names (`adapt_state`).

    Args:
        net: the network, a StagedNet or any other module.
        path: a file, or FILE:KEY for one of several networks in it.
        name: the network's name, for errors.
        num_classes: of the data, so that errors can tell a wrong class count from a wrong network.
        new_head: keep the network's classifier if the file's is for other classes.
        headless: keep it also if the file has none.
        diverged: accept weights with NaN or Inf after a printed warning.

    Returns:
        The file's metadata, None where missing: "norm", the [mean, std] by which the network's
        images are normalised; "data", facts about its training data.
    """
    contents = load_checkpoint(path)
    state = network_state(contents, path, net)
    _check_finite(state, net, path, diverged)
    if new_head or headless:
        own_head = with_own_head(net, state, headless)
        net.untrained_head = any(own_head[key] is not state.get(key) for key in own_head)
        state = own_head
    accept = getattr(net, "accept_neck", None)
    if accept is not None:
        accept(state)
    state = adapt_state(net, state)
    _refuse_other_head(net, state, path, name, num_classes)
    layouts.refuse_other_channels(state, net.state_dict(), path, name)
    load_state(net, state, f"checkpoint {path} and network {name}")
    return stated(contents, path)


def _check_finite(
    state: Mapping[str, Any], net: Any, path: str | os.PathLike[str], diverged: bool
) -> None:
    """Refuse weights with NaN or Inf; with `diverged` print a warning."""
    broken = not_finite(state, net.state_dict())
    if broken and not diverged:
        raise UserError(f"checkpoint {path} {broken}: its training diverged; take an earlier file")
    if broken and rank() == 0:
        print(f"WARNING: checkpoint {path} {broken}: its training diverged", flush=True)


def recorded_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint file, as :func:`load_network` returns it."""
    return stated(load_checkpoint(path), path)


def stated(contents: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata in a checkpoint's contents, see :func:`load_network`.

    The metadata describe "model", or the student in a run's checkpoint, not another network that
    FILE:KEY names.
    """
    recorded = isinstance(contents, Mapping) and "model" in contents
    recorded = recorded and split_key(path)[1].rpartition(".")[2] in ("", "model", "student")
    return {key: contents.get(key) if recorded else None for key in ("norm", "data")}
