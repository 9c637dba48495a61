"""DISTILLER.STUDENT_CKPT: a student that starts from a file of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mdistiller.console import print_log
from mdistiller.dataset import Data, TestData, are_numbers
from mdistiller.networks.class_order import match_classes, stated_classes
from mdistiller.registry import UserError
from mdistiller.runtime import project_root, rank
from mdistiller.weights import (
    adapt_state,
    head_state,
    load_checkpoint,
    load_state,
    network_state,
    not_finite,
    split_key,
    stated,
)

_SHOWN = 2  # tensors that a line names


def find_file(cfg: Any, key: str) -> Path:
    """The file that DISTILLER.{key} names, FILE or FILE:KEY: in the working directory, else in the
    project's folder.

    Raises:
        UserError: it does not exist.
    """
    path = Path(cfg.DISTILLER[key])
    places = (path, project_root() / path)
    file = next((place for place in places if split_key(place)[0].is_file()), None)
    if file is None:
        folder = any(place.is_dir() for place in places)
        reason = "is a folder: name a file in it, student_best, say" if folder else "does not exist"
        raise UserError(f"DISTILLER.{key}: {path} {reason}")
    return file


def load_start(
    cfg: Any, net: nn.Module, path: Path, name: str, data: Data | TestData
) -> dict[str, Any]:
    """Load what fits of a file of weights into a new network, and print what that was.

    Position embeddings are resampled (timm, torchvision), and a first convolution is adapted to the
    images' channels. A classifier for other classes, by number or by name, is not loaded; that of
    the same classes in another order is permuted. Whatever the file lacks keeps its random values.

    Args:
        net: on the CPU.
        path: FILE or FILE:KEY, see :func:`mdistiller.weights.network_state`.
        name: of the network, for messages.

    Returns:
        The file's metadata, as :func:`mdistiller.weights.load_network` returns them.

    Raises:
        UserError: no tensor but perhaps the classifier's fits, or weights are NaN or infinite.
    """
    contents = load_checkpoint(path)
    facts = stated(contents, path)
    state, expected = network_state(contents, path, net), net.state_dict()
    broken = not_finite(state, expected)
    if broken:
        raise UserError(f"DISTILLER.STUDENT_CKPT: {path} {broken}: its training diverged")
    head = head_state(net) if hasattr(net, "classifier") else {}
    adapted = _adapt(net, state, expected)
    fitting = {k: v for k, v in adapted.items() if k in expected and v.shape == expected[k].shape}
    other_head = _other_head(cfg, head, fitting, path, facts, data)
    if head and any(key.startswith("neck.") for key in state.keys() - expected.keys()):
        other_head = "the classifier (the file's is behind a neck, which SimKD adds)"
    if other_head:
        fitting = {key: value for key, value in fitting.items() if key not in head}
    if not any(map(_is_weight, fitting.keys() - head.keys())):
        raise UserError(_misfit(name, path, state, expected))
    load_state(net, {**expected, **fitting}, f"DISTILLER.STUDENT_CKPT {path} and network {name}")
    if head and not other_head:
        match_classes(cfg, net, path, facts, data)
    _report(name, path, state, expected, fitting, head, other_head)
    return facts


def _is_weight(key: str) -> bool:
    return not key.endswith("num_batches_tracked")


def _adapt(
    net: Any, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with position embeddings and the first convolution in the network's shape."""
    adapted = adapt_state(net, state)
    first = next((key for key, value in expected.items() if value.ndim == 4), None)
    if first in adapted and adapted[first].ndim == 4:
        adapted[first] = with_channels(adapted[first], expected[first].shape[1])
    return adapted


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first convolution [O, C, h, w] for images of another number of channels.

    One channel gets the sum over C, so that a grey image gives what it gave as a colour image; for
    more the channels are repeated in turn, scaled to the same sum if all are equal.
    """
    given = weight.shape[1]
    if given == channels:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / given), 1, 1)[:, :channels]
    return repeated * (given / channels)


def _other_head(
    cfg: Any,
    head: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    path: Path,
    facts: Mapping[str, Any],
    data: Data | TestData,
) -> str:
    """Why the file's classifier is not loaded, as the line says it; "" if it is."""
    if not head:
        return ""
    if head.keys() - fitting.keys():
        classes = data.num_classes
        return "the classifier " + (f"for {classes} classes" if classes else "(without labels)")
    theirs, ours = stated_classes(path, facts), list(data.classes)
    if not (theirs and ours and cfg.DISTILLER.CHECK_CLASSES) or sorted(theirs) == sorted(ours):
        return ""
    if are_numbers(theirs) or are_numbers(ours):  # one of the two has no names
        return ""
    return "the classifier (the file's classes have other names)"


def _misfit(
    name: str, path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str:
    """The error for a file of another network."""
    key = next((key for key in expected if key in state and _is_weight(key)), None)
    if key is not None:
        shapes = f"{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}"
    else:
        shapes = f"it begins with {next(iter(state))}, the network with {next(iter(expected))}"
    return (
        f"DISTILLER.STUDENT_CKPT: nothing in {path} fits the student {name} ({shapes}); is it of "
        "another network?"
    )


def _report(
    name: str,
    path: Path,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    other_head: str,
) -> None:
    """Print a line about what was loaded, resized, left new and not used."""
    if rank() != 0:
        return
    wanted = [key for key in expected if _is_weight(key)]
    loaded = [key for key in wanted if key in fitting]
    new = [key for key in wanted if key not in fitting and key not in head]
    resized = [
        f"{key} from {list(state[key].shape)} to {list(fitting[key].shape)}"
        for key in loaded
        if key in state and state[key].shape != fitting[key].shape
    ]
    unused = [key for key in state if key not in expected]
    parts = [f"{len(loaded)} of {len(wanted)} tensors loaded"]
    parts += [f"resized: {_listed(resized)}"] if resized else []
    fresh = [part for part in (other_head, _listed(new)) if part]
    parts += [f"new: {', '.join(fresh)}"] if fresh else []
    parts += [f"not used: {_listed(unused)}"] if unused else []
    warning = "WARNING: " if new else ""
    print_log(f"{warning}student {name} starts from {path}: {'; '.join(parts)}")


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def student_start(cfg: Any) -> Path | None:
    """The file that the student starts from, if any.

    Raises:
        UserError: it does not exist, or STUDENT_ARGS ask for released weights as well.
    """
    if not cfg.DISTILLER.STUDENT_CKPT:
        return None
    if cfg.DISTILLER.STUDENT_ARGS.get("pretrained"):
        raise UserError(
            "DISTILLER.STUDENT_CKPT and STUDENT_ARGS {pretrained: True} both say what the student "
            "starts from: leave one of them out"
        )
    return find_file(cfg, "STUDENT_CKPT")
