"""torch.compile for the networks of a distiller (SOLVER.COMPILE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mdistiller.console import print_log
from mdistiller.distillers import Distiller

BACKEND: str | Callable[..., Any] = "inductor"


def compile_networks(distiller: Distiller, setting: bool | str) -> None:
    """Compile student and teacher at their first forward pass; False does nothing.

    Modules, and names in checkpoints, stay the same. A network that cannot be compiled runs
    uncompiled, after one printed line with the reason.

    Args:
        setting: SOLVER.COMPILE: True, False or the mode.
    """
    if not setting:
        return
    mode = "default" if setting is True else setting
    teacher = distiller.teacher if distiller.frozen is None else distiller.frozen.net  # what runs
    for net in distiller.students():
        _compile(net, "student", mode)
    if isinstance(teacher, nn.Module):
        _compile(teacher, "teacher", mode)


def _compile(net: nn.Module, role: str, mode: str) -> None:
    try:
        net.compile(mode=mode, backend=BACKEND)
    except Exception as error:  # no support at all on this system or Python
        _give_up(net, role, error)
        return
    from torch._dynamo.exc import TorchDynamoException  # of the compiler, not of the network

    compiled = net._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            _give_up(net, role, error)
            return net(*args, **kwargs)

    net._compiled_call_impl = call


def _give_up(net: nn.Module, role: str, error: BaseException) -> None:
    net._compiled_call_impl = None
    cause = error.__cause__ or getattr(error, "inner_exception", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [""]
    text = f"SOLVER.COMPILE: the {role} runs uncompiled: {type(cause).__name__}: {lines[0]}"
    print_log(text)
