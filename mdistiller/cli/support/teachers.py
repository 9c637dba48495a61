"""The teachers that taught the runs which eval and visualize look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.registry import UserError

SAME = 0.3
"""Points by which accuracies may differ: another device rounds some images to the other side."""

if TYPE_CHECKING:
    import torch

    from mdistiller.dataset import TestData
    from mdistiller.engine.cfg import Config
    from mdistiller.evaluation.evaluate import Evaluation
    from mdistiller.evaluation.subjects import Source, Subject


def own_teachers(
    name: str, sources: Sequence[Source], cfg: Config, test: TestData, device: torch.device
) -> tuple[list[Subject | None], dict[Path, float]]:
    """The teacher beside each network, and the accuracies that the runs recorded of theirs.

    A teacher that all runs share is also beside networks that had none. One whose weights are not
    there is left out, with a line.

    Args:
        cfg: of the data; `test` is its test set.
        name: of the teacher; "" for whatever the runs had, "none" for none.

    Raises:
        UserError: the teacher has a name and is not there.
    """
    from mdistiller.console import print_log
    from mdistiller.evaluation.subjects import load_beside, run_teachers

    runs = taught_by(name, sources)
    teachers: dict[Path, Subject] = {}
    recorded: dict[Path, float] = {}
    try:
        for source, accuracies in run_teachers(runs, test):
            teacher = load_beside(source, cfg, test, device)
            teachers |= dict.fromkeys(accuracies, teacher)
            # Runs of earlier versions measured it on images prepared for the student.
            comparable = {run for run in accuracies if not teacher.loader or _states_it(run)}
            recorded |= {r: a for r, a in accuracies.items() if a is not None and r in comparable}
    except UserError as error:
        if name:
            raise
        print_log(f"no teacher beside {runs[0].label}: {error}")
        return [None] * len(sources), {}
    if len(distinct(teachers.values())) == 1:
        return [next(iter(teachers.values()))] * len(sources), recorded
    return [teachers.get(s.run) if s.run is not None else None for s in sources], recorded


def _states_it(run: Path) -> bool:
    """Whether a run records how its images were prepared."""
    from mdistiller.run_folder.record import read_record

    return "preprocessing" in (read_record(run).get("data") or {})


def distinct(teachers: Iterable[Subject | None]) -> list[Subject]:
    """The different ones, in order."""
    return list({id(one): one for one in teachers if one is not None}.values())


def taught_by(name: str, sources: Sequence[Source], several: bool = False) -> list[Source]:
    """Those of run folders whose method used one teacher; with a name, one of this name.

    Args:
        several: those of DISTILLER.TEACHERS as well, with a config that names all.
    """
    from mdistiller.config.roles import teacher_configs
    from mdistiller.distillers import get_distiller

    taught = []
    for source in sources:
        configs = teacher_configs(source.cfg)
        settings = configs[0].DISTILLER
        uses_one = len(configs) == 1 and get_distiller(settings.TYPE).uses_teacher
        if source.run is not None and name in ("", settings.TEACHER) and uses_one:
            taught.append(replace(source, cfg=configs[0]))
        elif source.run is not None and not name and several and len(configs) > 1:
            taught.append(source)
    return taught


def check_teachers(
    found: Sequence[Evaluation], subjects: Sequence[Subject], recorded: Mapping[Path, float]
) -> None:
    """Refuse a teacher of a run that is not as good here as when it taught.

    Args:
        found: the evaluations of `subjects` beside their teachers.
        recorded: the teacher's accuracy in percent by run.

    Raises:
        UserError: it differs by more than another device explains.
    """
    for one, subject in zip(found, subjects, strict=False):
        run = subject.source.run
        if run is None or run not in recorded or one.comparison is None:
            continue
        here, slack = one.quality.top1 + one.comparison.gap, 150.0 / one.quality.images
        if abs(recorded[run] - here) > max(SAME, slack):
            raise UserError(
                f"the teacher of {run} ({one.teacher}) has {here:.2f} % here, and "
                f"{recorded[run]:.2f} % when it taught: its file or the data have changed. Put "
                "them back, name the teacher by --teacher RUN, or give --teacher none"
            )
