"""Configs of single networks where DISTILLER.TEACHERS or DISTILLER.PEERS name several.

Everything that builds, finds or measures a network reads DISTILLER.TEACHER or STUDENT with their
CKPT, CFG, ARGS and NORM. An entry of a list is turned into a config that has it in this place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mdistiller.registry import UserError

_REST = {"CKPT": "", "CFG": "", "ARGS": {}, "NORM": "auto"}


def role_config(cfg: Any, role: str, entry: Mapping[str, Any]) -> Any:
    """`cfg` with the network of an entry in a role, "STUDENT" or "TEACHER", and without lists."""
    one = cfg.clone()
    one.defrost()
    node = one.DISTILLER
    node.TEACHERS, node.PEERS, node[role] = [], [], entry["NAME"]
    for key, default in _REST.items():
        name = f"{role}_{key}"
        if name in node:
            value = entry.get(key, default)
            node[name] = type(one)(value, new_allowed=True) if key == "ARGS" else value
    one.freeze()
    return one


def teacher_configs(cfg: Any) -> list[Any]:
    """A config for each teacher; `cfg` itself without DISTILLER.TEACHERS."""
    entries = cfg.DISTILLER.get("TEACHERS", [])
    return [role_config(cfg, "TEACHER", entry) for entry in entries] or [cfg]


@contextlib.contextmanager
def of_teacher(cfg: Any, number: int) -> Iterator[None]:
    """Have errors name the entry of DISTILLER.TEACHERS that they are about."""
    try:
        yield
    except UserError as error:
        if not cfg.DISTILLER.get("TEACHERS", []) or type(error) is not UserError:
            raise  # as it is: a training that diverged, say
        text = re.sub(r"(DISTILLER\.)?TEACHER_(CKPT|CFG|ARGS|NORM)\b", r"\2", str(error))
        raise UserError(f"DISTILLER.TEACHERS[{number}]: {text}") from None


def teacher_identity(cfg: Any) -> list[str]:
    """Name and arguments of the teacher's network, or of all and how they are combined."""
    configs = teacher_configs(cfg)
    nodes = [one.DISTILLER for one in configs]
    texts = [text for node in nodes for text in (node.TEACHER, str(node.TEACHER_ARGS))]
    return texts if len(configs) == 1 else [*texts, cfg.DISTILLER.COMBINE]


def teacher_name(cfg: Any) -> str:
    """The name of the teacher, or of all: "resnet56 + wrn_40_2"."""
    return " + ".join(one.DISTILLER.TEACHER for one in teacher_configs(cfg))


def peer_configs(cfg: Any) -> list[Any]:
    """A config for each of DISTILLER.PEERS, with the peer as its student; by default one peer like
    the student."""
    node = cfg.DISTILLER
    entries = node.PEERS or [
        {"NAME": node.STUDENT, "ARGS": node.STUDENT_ARGS, "NORM": node.STUDENT_NORM}
    ]
    return [role_config(cfg, "STUDENT", entry) for entry in entries]


def checkpoint_config(cfg: Any, file_name: str) -> Any:
    """The config of the network in a file of a run: a peer's for `student_peer1_best`, say.

    Args:
        cfg: of the run.

    Raises:
        UserError: the run has no such peer.
    """
    number = re.match(r"student_peer(\d+)_", file_name)
    if number is None:
        return cfg
    peers = peer_configs(cfg)
    if not 0 < int(number[1]) <= len(peers):
        raise UserError(f"{file_name}: the config names no peer {number[1]} (DISTILLER.PEERS)")
    return peers[int(number[1]) - 1]
