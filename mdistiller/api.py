"""The Python API: `mdistiller.train`, `evaluate`, `load`. docs/extend/python.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

import mdistiller.detection  # noqa: F401  # registers what configs have of it
from mdistiller.engine.cfg import load_config
from mdistiller.engine.hooks import Hook
from mdistiller.evaluation.evaluate import evaluate as evaluate_subjects
from mdistiller.evaluation.load import load_predictor
from mdistiller.evaluation.predict import Predictor
from mdistiller.evaluation.subjects import data_config, load_all, run_sources
from mdistiller.run import train as training
from mdistiller.run_folder.naming import experiment_name
from mdistiller.runtime import resolve_device

__all__ = ["Run", "evaluate", "load", "train"]
Overrides = Sequence[Any] | Mapping[str, Any]
"""`["SOLVER.LR", 0.1, ...]` or `{"SOLVER.LR": 0.1, ...}`."""


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: its run folder.
        summary: accuracy and time, the contents of `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def student(self) -> nn.Module:
        """The trained network in eval mode, with the weights of the best epoch."""
        network = load(self.folder).network
        assert network is not None
        return network


def train(
    cfg: str | Path | Mapping[str, Any] = "",
    overrides: Overrides = (),
    hooks: Sequence[Hook] = (),
    resume: bool | Literal["auto"] = False,
    imports: Sequence[str] = (),
) -> Run:
    """Train what a config describes, as the command `mdistiller train` does.

    Args:
        cfg: a YAML file, or what one holds (a loaded config is that as well).
        overrides: over the config, and in the run folder's name unless EXPERIMENT.NAME is one.
        hooks: objects that act at named moments of training, see :class:`Hook`.
        resume: continue the run in its folder; "auto": if there is one, else start it.
        imports: Python files that register methods, networks or data sets.

    Raises:
        UserError: something about the config or the data cannot work.
    """
    words = _words(overrides)
    whole = load_config(cfg, words, imports)
    named = [str(word) for word in words]
    summary = training.train(whole, named, resume=resume, hooks=hooks)
    return Run(Path(whole.LOG.PREFIX) / experiment_name(whole, named), summary)


def load(
    source: str | Path | Run,
    checkpoint: str = "best",
    device: str = "auto",
    overrides: Overrides = (),
    imports: Sequence[str] = (),
) -> Predictor:
    """A trained network with `predict`; see :func:`mdistiller.evaluation.load.load_predictor`.

    Args:
        source: a run folder, what :func:`train` returned, a checkpoint in a run folder, or a file
            of `mdistiller export`.
    """
    path = source.folder if isinstance(source, Run) else source
    return load_predictor(path, checkpoint, device, _words(overrides), imports)


def evaluate(
    *runs: str | Path | Run,
    checkpoints: Sequence[str] = ("best",),
    overrides: Overrides = (),
    imports: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure the students of runs on their test set, which is read once for all.

    Args:
        runs: run folders, or what :func:`train` returned.
        checkpoints: best, latest, epoch_N, ema_best or ema_latest; of each run.
        overrides: over the config of the data.
        imports: user files that the runs were trained with.

    Returns:
        For each run and checkpoint "label", "top1", "top5", "nll", "ece" and more, as
        `mdistiller eval --json` writes them.
    """
    folders = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    sources = [one for folder in folders for one in run_sources(folder, checkpoints, imports)]
    cfg = data_config(sources, _words(overrides), imports)
    device = resolve_device(cfg.DEVICE)
    test, subjects = load_all(sources, cfg, device)
    found = evaluate_subjects(subjects, test.loader, test.num_classes, device)
    return [one.record() for one in found]


def _words(overrides: Overrides) -> list[Any]:
    """Overrides as `[key, value, ...]`."""
    if isinstance(overrides, Mapping):
        return [word for pair in overrides.items() for word in pair]
    return list(overrides)
