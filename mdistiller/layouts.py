"""Layouts of checkpoint files: where the state dict is, and how its keys are named.

Trainers nest a state dict in other mappings ("state_dict", "net", "MODEL_STATE", ...), save a
moving average next to it, and prefix its keys by the names of wrappers ("module.", "model.", ...).
:func:`find_states` finds the state dicts of a file, :func:`choose_state` selects one of them, and
:func:`match_keys` renames its keys to those of a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from mdistiller.registry import UserError

State = Mapping[str, Tensor]

_DEEPEST = 8
_USUAL = ("model", "state_dict")
"""What timm, torchvision and this library call the weights: taken before other names."""
_COUNTERS = ("total_ops", "total_params", "n_averaged")
"""What the package thop adds to every module, and torch's AveragedModel to itself."""
_WRAPPERS = ("module", "_orig_mod")
_SHOWN = 6


def find_states(contents: object, name: str = "", depth: int = 0) -> dict[str, State]:
    """The state dicts in a file's contents, by their dotted path; "" is the file itself.

    A mapping is one if it holds only tensors, or more tensors than the mappings nested in it
    (:func:`odd_key` then names other entries). Optimizer states are left out.
    """
    if not isinstance(contents, Mapping) or depth > _DEEPEST or "param_groups" in contents:
        return {}
    direct = sum(isinstance(value, Tensor) for value in contents.values())
    floats = sum(_is_weight(value) for value in contents.values())
    if floats and direct == len(contents):
        return {name: contents}
    below: dict[str, State] = {}
    for key, value in contents.items():
        if isinstance(key, int) or str(key).lower().startswith("optim"):
            continue
        below |= find_states(value, f"{name}.{key}" if name else str(key), depth + 1)
    matrices = {place: state for place, state in below.items() if _has_matrix(state)}
    below = matrices or below
    here = direct and direct >= sum(map(len, below.values()))
    return {name: contents} if here and (floats or not below) else below


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _has_matrix(state: State) -> bool:
    return any(isinstance(v, Tensor) and _is_weight(v) and v.ndim > 1 for v in state.values())


def choose_state(states: Mapping[str, State], path: object, key: str = "") -> tuple[str, State]:
    """Select one of a file's state dicts; returns it with its path.

    A moving average is preferred (except in files of this library, which has separate files for
    it), then "model" or "state_dict".

    Args:
        states: by path; at least one.
        path: for errors.
        key: the user's choice: a path, the end of one, or that and a prefix of its keys.

    Raises:
        UserError: the choice does not exist, or none of several is preferred.
    """
    if key:
        return key, _at_key(states, path, key)
    averages = [place for place in states if _is_average(place)]
    usual = [place for place in states if place in _USUAL]
    ours = any(is_of_run(states[place]) for place in usual)
    for preferred in (list(states), [] if ours else averages, usual):
        if len(preferred) == 1:
            return preferred[0], states[preferred[0]]
    raise UserError(
        f"checkpoint {path} holds the weights of several networks ({_names(states)}): name one, as "
        f"{path}:{next(iter(states))}"
    )


def choose_fitting(
    states: Mapping[str, State], path: object, own: State, aliases: Mapping[str, str]
) -> tuple[str, State]:
    """:func:`choose_state` among the state dicts that fit a network, or of which a part does.

    Those with its names and shapes come first, then those with its names.

    Args:
        own: the network's state dict; `aliases` as of :func:`match_keys`.
    """
    parts = {".".join(filter(None, (p, n))): v for p, s in states.items() for n, v in _parts(s)}
    for exact in (True, False):
        for pool in (states, parts):
            fitting = {
                place: state
                for place, state in pool.items()
                if _fits(match_keys(state, own, aliases), own, exact)
            }
            if fitting:
                return choose_state(fitting, path)
    return choose_state(states, path)


def _fits(state: State, own: State, exact: bool) -> bool:
    if any(key not in state and not key.endswith("num_batches_tracked") for key in own):
        return False
    shapes = all(state[key].shape == own[key].shape for key in own if key in state)
    extra = any(key not in own and not key.startswith("neck.") for key in state)
    return not exact or (shapes and not extra)


def is_of_run(state: State) -> bool:
    """Whether a state dict is a distiller's, as in training checkpoints."""
    return any(str(key).removeprefix("module.").startswith("student.") for key in state)


def _at_key(states: Mapping[str, State], path: object, key: str) -> State:
    for place, state in states.items():
        if place == key or place.endswith(f".{key}"):
            return state
    for place, state in states.items():
        if not place or key.startswith(f"{place}."):
            part = _strip_group(state, key.removeprefix(f"{place}."))
            if part:
                return part
    parts = [".".join(filter(None, (p, name))) for p, s in states.items() for name, _ in _parts(s)]
    parts = parts if len(states) == 1 and parts else list(states)
    raise UserError(f"checkpoint {path} has no weights under {key!r}; it has {_names(parts)}")


def _is_average(place: str) -> bool:
    return any("ema" in word.lower().split("_") for word in place.split("."))


def _names(places: Iterable[str]) -> str:
    every = list(places)
    shown = [place or "the file itself" for place in every[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def match_keys(
    state: State, own: State | None = None, aliases: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Rename the keys of `state` to those of a network.

    A prefix that all keys share is removed if more keys then match the network; from a distiller's
    state the student is taken; "backbone." is removed from the keys that have it, if more then
    match. Batch-norm counters that the network does not have are left out.

    Args:
        own: the network's state dict; None: only remove the prefixes of wrappers.
        aliases: other names of modules -> the network's names.
    """
    if own is None:
        return _without_wrappers(state)
    kept = {k: v for k, v in state.items() if k in own or k.rpartition(".")[2] not in _COUNTERS}
    options = [_renamed(option, own, aliases or {}) for option in _options(kept)]
    return max(options, key=lambda option: sum(key in own for key in option))


def _without_wrappers(state: State) -> dict[str, Tensor]:
    plain = dict(state)
    while (prefix := _shared(plain)) in _WRAPPERS:
        plain = _strip_group(plain, prefix)
    return _strip_group(plain, "student") or plain


def _options(state: State) -> Iterator[State]:
    """Candidates: `state` without each shared prefix; of a distiller only the student.

    Last are those of a body with the prefix "backbone." and a head, with or without a prefix.
    """
    yield state
    student, body = _strip_group(state, "student"), _strip_group(state, "backbone")
    prefix = _shared(state)
    if student:
        yield from _options(student)
    elif prefix:
        yield from _options(_strip_group(state, prefix))
    elif body:
        rest = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        yield {**rest, **body}
        yield {**{key.partition(".")[2]: value for key, value in rest.items()}, **body}


def _parts(state: State) -> Iterator[tuple[str, State]]:
    """The submodules' state dicts, by the first words of their keys."""
    if _shared(state):
        for name, part in _parts(_strip_group(state, _shared(state))):
            yield f"{_shared(state)}.{name}", part
        return
    names = dict.fromkeys(str(key).partition(".")[0] for key in state if "." in str(key))
    yield from ((name, _strip_group(state, name)) for name in names)


def _shared(state: State) -> str:
    """The first word of all keys, if they share one and more follows; else ""."""
    first = next(iter(state), "").partition(".")[0]
    return first if first and all(key.startswith(f"{first}.") for key in state) else ""


def _strip_group(state: State, name: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    start = f"{name}."
    return {
        k[len(start) :]: v for k, v in state.items() if isinstance(k, str) and k.startswith(start)
    }


def _renamed(state: State, own: State, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    if not aliases:
        return dict(state)

    def name(key: str) -> str:
        other = ".".join(aliases.get(word, word) for word in key.split("."))
        return other if key not in own and other in own else key

    return {name(key): value for key, value in state.items()}


def refuse_other_channels(
    state: State, expected: State, path: str | os.PathLike[str], name: str
) -> None:
    """Refuse a network's weights that were made for images of another number of channels.

    Args:
        state: of the file.
        expected: of the network, `name`.
    """
    differ = [k for k, v in expected.items() if k in state and state[k].shape != v.shape]
    first = next((k for k, v in expected.items() if v.ndim == 4), None)
    if first is None or differ != [first] or state[first].ndim != 4:
        return
    given, wanted = state[first].shape[1], expected[first].shape[1]
    if given != wanted:
        raise UserError(
            f"checkpoint {path} is of a {name} for images of {given} channels, but "
            f"DATASET.CHANNELS is {wanted}: set it to {given}, or fine-tune the network first with "
            "the file as DISTILLER.STUDENT_CKPT, which adapts it"
        )
