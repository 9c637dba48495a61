"""Optimizers from a config.

An optimizer is a function (groups, solver) -> torch.optim.Optimizer, registered for SOLVER.TYPE;
other names are those of timm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

from mdistiller.registry import Registry, UserError, first_line, is_builtin, suggest

OPTIMIZERS = Registry("optimizer (SOLVER.TYPE)")
Groups = list[dict[str, Any]]


@OPTIMIZERS.register("SGD")
def sgd(groups: Groups, solver: Any) -> Optimizer:
    """SGD with momentum; weight decay on everything, as the published recipes have it."""
    return SGD(
        groups,
        lr=solver.LR,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        nesterov=solver.NESTEROV,
        **_maskable(groups, solver),
        **arguments(solver),
    )


@OPTIMIZERS.register("Adam")
def adam(groups: Groups, solver: Any) -> Optimizer:
    decay, more = solver.WEIGHT_DECAY, arguments(solver)
    return Adam(groups, lr=solver.LR, weight_decay=decay, **_maskable(groups, solver), **more)


@OPTIMIZERS.register("AdamW")
def adamw(groups: Groups, solver: Any) -> Optimizer:
    decay, more = solver.WEIGHT_DECAY, arguments(solver)
    return AdamW(groups, lr=solver.LR, weight_decay=decay, **_maskable(groups, solver), **more)


def arguments(solver: Any) -> dict[str, Any]:
    """SOLVER.OPTIMIZER_ARGS, keyword arguments of the optimizer's class."""
    return dict(solver.get("OPTIMIZER_ARGS", {}))


def _maskable(groups: Groups, solver: Any) -> dict[str, Any]:
    """The option that lets a GPU decide by itself to leave a step out (see `non_finite.py`)."""
    return {"fused": True} if solver.SKIP_NONFINITE and _on_gpu(groups) else {}


def _on_gpu(groups: Groups) -> bool:
    return any(param.is_cuda for group in groups for param in group["params"])


def optimizer_maker(name: str) -> Callable[[Groups, Any], Optimizer]:
    """The function for a SOLVER.TYPE: a registered one, in any case of letters, else timm's.

    Raises:
        UserError: neither has the name.
    """
    registered = {entry.casefold(): entry for entry in OPTIMIZERS}
    if name not in OPTIMIZERS and name.casefold() in registered:
        name = registered[name.casefold()]
    if name in OPTIMIZERS:
        maker: Callable[[Groups, Any], Optimizer] = OPTIMIZERS[name]
        return maker
    known = ", ".join(OPTIMIZERS)
    try:
        from timm.optim import get_optimizer_info, list_optimizers
    except ImportError:
        raise UserError(
            f"unknown optimizer (SOLVER.TYPE) {name!r}{suggest(name, OPTIMIZERS)} (known: {known}; "
            "those of timm after pip install mdistiller[timm])"
        ) from None
    names: list[str] = list(map(str, list_optimizers()))
    plain = name.lower().removeprefix("lookahead_")
    if plain not in names:
        near = suggest(name, [*OPTIMIZERS, *names])
        raise UserError(
            f"unknown optimizer (SOLVER.TYPE) {name!r}{near} (known: {known}, and those of "
            f"timm.optim.list_optimizers(), such as {', '.join(names[:3])})"
        )
    if get_optimizer_info(plain).second_order:
        raise UserError(f"SOLVER.TYPE {name} needs second derivatives, which no trainer computes")
    return functools.partial(_of_timm, name)


def _of_timm(name: str, groups: Groups, solver: Any) -> Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info

    given = {"lr": solver.LR, "weight_decay": solver.WEIGHT_DECAY, "momentum": solver.MOMENTUM}
    info, more = get_optimizer_info(name.lower().removeprefix("lookahead_")), arguments(solver)
    ignored = {"layer_decay", "layer_decay_min_scale", "filter_bias_and_bn", "param_group_fn"}
    ignored |= {key for key in ("eps", "betas") if not getattr(info, f"has_{key}")}
    if ignored & more.keys():
        raise UserError(
            f"SOLVER.OPTIMIZER_ARGS {', '.join(sorted(ignored & more.keys()))} has no effect on "
            f"SOLVER.TYPE {name}: leave it out"
        )
    optimizer: Optimizer = create_optimizer_v2(groups, name, **given, **more)
    return optimizer


def build_optimizer(groups: Groups, solver: Any) -> Optimizer:
    """The optimizer of `cfg.SOLVER` over parameter groups.

    Args:
        groups: as torch takes them; groups may set their own `lr` and `weight_decay`.
        solver: the SOLVER node.

    Raises:
        UserError: the name is unknown, its arguments do not fit, or there is nothing to train.
    """
    seen: set[int] = set()
    for group in groups:  # a parameter in two places would be stepped twice
        params = {id(p): p for p in group["params"] if id(p) not in seen}
        seen |= set(params)
        group["params"] = list(params.values())
    if not seen:
        raise UserError("no parameters are left to train: see SOLVER.FREEZE")
    make, groups = optimizer_maker(solver.TYPE), decay_groups(groups, solver)
    try:
        optimizer = make(groups, solver)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        if not is_builtin(getattr(make, "func", make)):  # a user's, who wants the traceback
            raise
        more = arguments(solver)
        given = f" with OPTIMIZER_ARGS {more}" if more else ""
        raise UserError(f"SOLVER.TYPE {solver.TYPE}{given}: {first_line(error)}") from error
    if solver.SKIP_NONFINITE and _on_gpu(groups) and not optimizer.defaults.get("fused"):
        raise UserError(
            f"SOLVER.TYPE {solver.TYPE} cannot skip steps on a GPU: set SOLVER.SKIP_NONFINITE 0"
        )
    return optimizer


def decay_groups(groups: Groups, solver: Any) -> Groups:
    """The groups, with biases and the parameters of norms apart where SOLVER.NORM_DECAY is False.

    Those (all with less than two dimensions, as is usual for transformers) then have no decay.
    """
    if solver.NORM_DECAY:
        return groups
    split = []
    for group in groups:
        wide = [param for param in group["params"] if param.ndim > 1]
        narrow = [param for param in group["params"] if param.ndim <= 1]
        split += [{**group, "params": wide}] if wide else []
        split += [{**group, "params": narrow, "weight_decay": 0.0}] if narrow else []
    return split
