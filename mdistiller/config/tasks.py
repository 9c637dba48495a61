"""Tasks other than classification: what the engine and reports need to know about them.

A package that adds one registers it when it is imported (`mdistiller.detection` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mdistiller.registry import Registry

TASKS = Registry("task")
NETWORKS = ("DISTILLER.TEACHER", "DISTILLER.STUDENT")
"""Config keys of the networks in classification."""


@dataclass(frozen=True)
class Task:
    """A kind of run other than classification.

    Attributes:
        section: of the config that only its runs have.
        runs_by: how to start one, for errors: "this is for ...: run it with ...".
        score: key of the record whose best value is kept, in percent.
        score_name: the score in words.
        logged: keys of the record that the text log has.
        curves: key, title and unit of the learning curves in a report.
        subject: config keys that must agree for scores to be comparable.
        paths: those of `subject` that are paths.
        without_effect: config keys that leave the trained weights as they are.
        networks: config keys of teacher and student.
    """

    section: str
    runs_by: str
    score: str
    score_name: str
    logged: tuple[str, ...] = ()
    curves: tuple[tuple[str, str, str], ...] = ()
    subject: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    networks: tuple[str, str] = NETWORKS


def task_of(cfg: Any) -> Task | None:
    """The task of a config, a nested one or a flat one with dotted keys; None: classification."""
    sections = {str(key).partition(".")[0] for key in cfg}
    return next((task for task in TASKS.values() if task.section in sections), None)
