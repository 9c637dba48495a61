"""Where a checkpoint file keeps a network's tensors, and under which names.

Trainers wrap a state dict in other mappings ("state_dict", "net", "MODEL_STATE", ...), save a
moving average beside it, and put the names of wrappers before its keys ("module.", "model.", ...).
:func:`find_states` finds the state dicts of a file, :func:`choose_state` takes one of them, and
:func:`match_keys` gives its tensors the names that a network uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

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
    """The state dicts in what a file holds, by their dotted place; "" is the file itself.

    A mapping of nothing but tensors is one, and a mapping with more tensors in it than in the
    mappings below it (:func:`odd_key` then names what does not belong). Optimizers are left out.
    """
    if not isinstance(contents, Mapping) or depth > _DEEPEST or "param_groups" in contents:
        return {}
    direct = sum(isinstance(value, Tensor) for value in contents.values())
    floats = sum(_is_weight(value) for value in contents.values())
    if floats and direct == len(contents):
        return {name: contents}
    below: dict[str, State] = {}
    for key, value in contents.items():
        below |= find_states(value, f"{name}.{key}" if name else str(key), depth + 1)
    matrices = {place: state for place, state in below.items() if _has_matrix(state)}
    below = matrices or below
    here = direct and direct >= sum(map(len, below.values()))
    return {name: contents} if here and (floats or not below) else below


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _has_matrix(state: State) -> bool:
    return any(isinstance(v, Tensor) and _is_weight(v) and v.ndim > 1 for v in state.values())


def choose_state(
    states: Mapping[str, State],
    path: object,
    key: str = "",
    fits: Callable[[State], bool] | None = None,
) -> tuple[str, State]:
    """One of the state dicts of a file, and its place.

    Args:
        states: what :func:`find_states` returns; at least one.
        path: for errors.
        key: the user's choice: a place, the end of one, or that and a prefix of its keys.
        fits: whether a state dict is that of the wanted network. Of several that fit, the moving
            average is taken, else "model" or "state_dict".

    Raises:
        UserError: the choice does not exist, or there are several and none to prefer.
    """
    if key:
        return key, _at_key(states, path, key)
    pool = [place for place, state in states.items() if fits and fits(state)] or list(states)
    averages = [place for place in pool if _is_average(place)]
    usual = [place for place in pool if place in _USUAL]
    ours = any(is_of_run(states[place]) for place in usual)
    for preferred in (pool, [] if ours else averages, usual):
        if len(preferred) == 1:
            return preferred[0], states[preferred[0]]
    raise UserError(
        f"checkpoint {path} holds the weights of several networks ({_names(pool)}): name one, as "
        f"{path}:{pool[0]}"
    )


def is_of_run(state: State) -> bool:
    """Whether a state dict is that of a distiller: a training checkpoint of a run has it."""
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
    parts = [".".join(filter(None, (p, name))) for p, s in states.items() for name in _groups(s)]
    raise UserError(f"checkpoint {path} has no weights under {key!r}; it has {_names(parts)}")


def _is_average(place: str) -> bool:
    return any("ema" in word.lower().split("_") for word in place.split("."))


def _names(places: list[str]) -> str:
    shown = [place or "the file itself" for place in places[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")


def match_keys(
    state: State, own: State | None = None, aliases: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """`state` under the names of a network.

    Whatever prefix all keys share goes if more of them are the network's without it; of the state
    of a distiller the student is taken; so is the one part of a larger module that has all the
    network's tensors; "backbone." goes from the keys that have it, if all the rest then fit.
    Counters that the network does not have are left out.

    Args:
        own: the network's state dict; None to remove the prefixes of wrappers alone.
        aliases: other names of modules, and the network's for them.
    """
    if own is None:
        return _without_wrappers(state)
    kept = {k: v for k, v in state.items() if k in own or k.rpartition(".")[2] not in _COUNTERS}
    options = [_renamed(option, own, aliases or {}) for option in _options(kept)]
    best = max(options, key=lambda option: sum(key in own for key in option))
    if not has_all(best, own):
        parts = [_renamed(part, own, aliases or {}) for o in options for part in _parts(o)]
        whole = [part for part in parts if has_all(part, own)]
        if len(whole) == 1:
            return whole[0]
    return best


def has_all(state: State, own: State) -> bool:
    """Whether no tensor of `own` but counters is missing."""
    return all(key in state or key.endswith("num_batches_tracked") for key in own)


def _without_wrappers(state: State) -> dict[str, Tensor]:
    plain = dict(state)
    while (prefix := _shared(plain)) in _WRAPPERS:
        plain = _strip_group(plain, prefix)
    return _strip_group(plain, "student") or plain


def _options(state: State) -> Iterator[State]:
    """`state`, without each prefix that its keys share in turn, and the student of a distiller."""
    yield state
    student = _strip_group(state, "student")
    prefix = _shared(state)
    if student:
        yield from _options(student)
    elif prefix:
        yield from _options(_strip_group(state, prefix))


def _parts(state: State) -> Iterator[State]:
    """The parts of a larger module; and its body with the head, each without its prefix."""
    groups = _groups(state)
    if len(groups) < 2:
        return
    for name in groups:
        part = _strip_group(state, name)
        yield part
        rest = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        if name == "backbone":
            yield {**rest, **part}
            yield {**{key.partition(".")[2]: value for key, value in rest.items()}, **part}


def _groups(state: State) -> dict[str, int]:
    """First words of dotted keys, and how many keys have each."""
    return dict(Counter(key.partition(".")[0] for key in state if "." in str(key)))


def _shared(state: State) -> str:
    """The first word of all keys, if they share one and more follows it; or ""."""
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
