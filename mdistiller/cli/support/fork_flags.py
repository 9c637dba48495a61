"""Options of research forks' tools/train.py, as the overrides that they stand for.

`--logit-stand` of LSKD's standardises logits, with base temperature 2 and weight 9 if
`--base-temp` and `--kd-weight` give no others; `--same-t` of RLD's has ALPHA_T be T.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from mdistiller.registry import UserError

_TEMPERATURES = ("TEMPERATURE", "T", "TEMPS")  # of the last, the first one
_WEIGHTS = ("LOSS.KD_WEIGHT", "KD_WEIGHT")


def add_fork_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options to those of a command that trains classifiers."""
    group = parser.add_argument_group("options of forks' commands, in place of overrides")
    group.add_argument(
        "--logit-stand",
        action="store_true",
        help="EXPERIMENT.LOGIT_STAND True, and as LSKD has it --base-temp 2 --kd-weight 9",
    )
    group.add_argument("--base-temp", type=float, metavar="T", help="the method's temperature")
    group.add_argument(
        "--kd-weight", type=float, metavar="W", help="weight of its loss (DKD: factor of both)"
    )
    group.add_argument("--same-t", action="store_true", help="RLD: ALPHA_T is T")


def fork_overrides(args: argparse.Namespace, cfg: Any, nodes: Sequence[str]) -> list[str]:
    """The overrides, `[key, value, ...]`, that the options stand for.

    Args:
        cfg: the config without them.
        nodes: those that its method reads, its own first.

    Raises:
        UserError: the method has no such setting.
    """
    words: list[str] = []
    temperature, weight = args.base_temp, args.kd_weight
    if args.logit_stand:
        words += ["EXPERIMENT.LOGIT_STAND", "True"]
        temperature = 2.0 if temperature is None else temperature
        weight = 9.0 if weight is None else weight
    if temperature is not None:
        key, value = _find(cfg, nodes, _TEMPERATURES, "--base-temp")
        new = [temperature, *value[1:]] if key.endswith(".TEMPS") else temperature
        words += [key, str(new)]
    if weight is not None:
        words += _weights(cfg, nodes, weight)
    if args.same_t:
        key, _ = _find(cfg, nodes, ("ALPHA_T",), "--same-t")
        if temperature is None:
            temperature = _find(cfg, [key.partition(".")[0]], ("T",), "--same-t")[1]
        words += [key, str(temperature)]
    return words


def _weights(cfg: Any, nodes: Sequence[str], weight: float) -> list[str]:
    """The weight of the loss, or those of its two parts times `weight`."""
    for name in nodes:
        node = cfg.get(name, {})
        if not any(_lookup(node, key) is not None for key in _WEIGHTS) and "BETA" in node:
            keys = [key for key in ("ALPHA", "BETA") if key in node]
            return [w for key in keys for w in (f"{name}.{key}", str(weight * node[key]))]
    key, _ = _find(cfg, nodes, _WEIGHTS, "--kd-weight")
    return [key, str(weight)]


def _find(cfg: Any, nodes: Sequence[str], keys: Sequence[str], flag: str) -> tuple[str, Any]:
    """The first of the keys that a node has, whole, and its value."""
    for name in nodes:
        for key in keys:
            value = _lookup(cfg.get(name, {}), key)
            if value is not None:
                return f"{name}.{key}", value
    raise UserError(
        f"{flag}: DISTILLER.TYPE {cfg.DISTILLER.TYPE} lacks the keys {', '.join(keys)} in "
        f"{' or '.join(nodes)}; give the setting as KEY VALUE"
    )


def _lookup(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
