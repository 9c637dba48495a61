"""SOLVER.FREEZE, LR_BY_NAME and LAYER_DECAY: parameters of the student chosen by name.

Names are those of the student's state dict. A pattern has the wildcards of file names (`*`, `?`,
`[abc]`; a `*` also covers dots), and a module's name stands for all below it: `layer1` is
`layer1.*`. Of several patterns that match the last counts; in FREEZE one with a `!` in front makes
an exception: ["*", "!fc"].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mdistiller.registry import UserError, suggest

Groups = list[dict[str, Any]]


def parameter_names(student: nn.Module) -> dict[str, nn.Parameter]:
    """The student's parameters by their names in its state dict."""
    state = student.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, nn.Parameter)}


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern covers a parameter or buffer."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether patterns of SOLVER.FREEZE cover a parameter or buffer."""
    last = [pattern for pattern in patterns if matches(name, pattern.removeprefix("!"))][-1:]
    return bool(last) and not last[0].startswith("!")


def freeze(student: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Turn off the gradients of the parameters that a pattern covers.

    Returns:
        The norms to keep in eval mode: those whose parameters are all frozen, or, of norms without
        parameters, whose running statistics a pattern covers.

    Raises:
        UserError: a pattern covers nothing, or nothing is left to train.
    """
    patterns = [str(pattern) for pattern in patterns]
    names = parameter_names(student)
    for pattern in patterns:
        _require_match("SOLVER.FREEZE", pattern.removeprefix("!"), names)
    for name, param in names.items():
        if is_frozen(name, patterns):
            param.requires_grad_(False)
    if patterns and not any(param.requires_grad for param in names.values()):
        raise UserError(
            f"SOLVER.FREEZE {patterns} leaves no parameter of the student to train; a ! in front "
            'of a pattern makes an exception: ["*", "!fc"]'
        )
    buffers = {id(b): name for name, b in student.state_dict(keep_vars=True).items()}

    def is_fixed(norm: nn.Module) -> bool:
        own = list(norm.parameters(recurse=False))
        if own:
            return not any(param.requires_grad for param in own)
        return is_frozen(buffers.get(id(norm.running_mean), ""), patterns)

    norms = [m for m in student.modules() if getattr(m, "running_mean", None) is not None]
    return [norm for norm in norms if patterns and is_fixed(norm)]


def student_groups(groups: Groups, solver: Any, model: Any) -> Groups:
    """Parameter groups without frozen parameters, split by SOLVER.LR_BY_NAME and LAYER_DECAY.

    A group with another rate has its factor under "lr_scale"; groups at the plain rate come first.

    Args:
        model: the distiller.

    Raises:
        UserError: a pattern covers nothing, or the network does not tell its layers.
    """
    if "FREEZE" not in solver:  # of a kind of run without these keys
        return groups
    if solver.FREEZE:
        groups = without_frozen(groups, model.student)
    if solver.LAYER_DECAY == 1.0 and not solver.LR_BY_NAME:
        return groups
    scales = _scales(solver, model.student)
    split: Groups = []
    for group in groups:
        parts: dict[float, list[Any]] = {}
        for param in group["params"]:
            parts.setdefault(scales.get(id(param), 1.0), []).append(param)
        for scale, params in parts.items():
            rate = {"lr": group.get("lr", solver.LR) * scale, "lr_scale": scale}
            split.append({**group, "params": params, **(rate if scale != 1.0 else {})})
    return sorted(split, key=lambda group: "lr_scale" in group)


def without_frozen(groups: Groups, student: nn.Module) -> Groups:
    """Parameter groups without the parameters of the student that have no gradient."""
    frozen = {id(param) for param in student.parameters() if not param.requires_grad}
    kept = ([p for p in group["params"] if id(p) not in frozen] for group in groups)
    return [{**group, "params": left} for group, left in zip(groups, kept, strict=True) if left]


def _scales(solver: Any, student: nn.Module) -> dict[int, float]:
    """The factor on the learning rate by id of the parameter, as far as a key sets one."""
    scales: dict[int, float] = {}
    names = parameter_names(student)
    if solver.LAYER_DECAY != 1.0:
        depths = _depths(student)
        deepest = max(depths.values())
        scales = {
            id(param): solver.LAYER_DECAY ** (deepest - depths.get(name, deepest))
            for name, param in names.items()
        }
    by_name: dict[int, float] = {}  # of several patterns the last counts
    for pattern, scale in lr_patterns(solver.LR_BY_NAME).items():
        _require_match("SOLVER.LR_BY_NAME", pattern, names)
        by_name |= {id(p): scale for name, p in names.items() if matches(name, pattern)}
    return scales | {key: scale * scales.get(key, 1.0) for key, scale in by_name.items()}


def _depths(student: Any) -> Mapping[str, int]:
    depths: Mapping[str, int] = getattr(student, "parameter_depths", dict)()
    if not depths:
        raise UserError(
            f"SOLVER.LAYER_DECAY: {type(student).__name__} does not say in which layer its "
            "parameters are (networks of the zoo and of timm do): use SOLVER.LR_BY_NAME"
        )
    return depths


def require_scaled(groups: Groups, solver: Any) -> None:
    """Refuse groups of a user's trainer without the factors that the config asks for."""
    for key, plain in (("LR_BY_NAME", []), ("LAYER_DECAY", 1.0)):
        if solver[key] != plain and not any("lr_scale" in group for group in groups):
            raise UserError(
                f"SOLVER.{key} has no effect on SOLVER.TRAINER {solver.TRAINER}, which overrides "
                "init_optimizer: let it call super().init_optimizer(cfg), or leave the key out"
            )


def lr_patterns(texts: Sequence[str]) -> dict[str, float]:
    """SOLVER.LR_BY_NAME, a list of "PATTERN=FACTOR", as pattern -> factor.

    Raises:
        UserError: an entry is not of that form, or its factor is not positive.
    """
    factors: dict[str, float] = {}
    for text in texts:
        pattern, _, factor = str(text).rpartition("=")
        try:
            factors[pattern] = float(factor)
        except ValueError:
            factors[pattern] = 0.0
        if not pattern or not 0 < factors[pattern] < float("inf"):
            raise UserError(
                f'SOLVER.LR_BY_NAME must be a list of "PATTERN=FACTOR" with positive factors, such '
                f'as ["layer1.*=0.1", "fc=10"], got {text!r}; SOLVER.FREEZE keeps weights fixed'
            )
    return factors


def _require_match(key: str, pattern: str, names: Iterable[str]) -> None:
    if not any(matches(name, pattern) for name in names):
        modules = {".".join(name.split(".")[:k]) for name in names for k in (1, 2, 3)}
        near = suggest(pattern.removesuffix(".*"), sorted({*modules, *names}))
        tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
        raise UserError(
            f"{key}: {pattern!r} matches no parameter of the student"
            f"{near or f' (its modules: {tops})'}"
        )
