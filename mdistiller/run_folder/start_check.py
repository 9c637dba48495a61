"""Whether a run may begin, or go on, in a folder."""

from __future__ import annotations

from pathlib import Path

from mdistiller.engine.cfg import Config
from mdistiller.engine.checkpoints.store import LATEST, Store
from mdistiller.engine.optim.schedules import depends_on_epochs
from mdistiller.registry import UserError
from mdistiller.run_folder.changes import changed_settings, side_settings
from mdistiller.run_folder.folder import stretched
from mdistiller.run_folder.record import recorded_settings

_AS_BEFORE = {
    "RESIZE": "DATASET.RESIZE was auto, is now stretch",
    "EXIF": "DATASET.EXIF was True, is now False",
    "JPEG_SCALING": "DATASET.JPEG_SCALING was train, is now none",
}
"""Settings that change nothing for a run from before these keys existed."""


def check_folder(folder: Path, cfg: Config, resume: bool, allow_changes: bool = False) -> list[str]:
    """Refuse to overwrite a run, and to resume one that does not exist or has other settings.

    Returns:
        The changed settings of a resumed run.
    """
    blocked = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocked:
        raise UserError(f"LOG.PREFIX: {blocked} is a file, so {folder} cannot be a folder")
    there = bool(Store(folder).candidates())
    if not resume and there:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or start another under "
            "EXPERIMENT.NAME (to do it again, remove the folder)"
        )
    kept = None if there else trained_file(folder)
    if kept:
        raise UserError(
            f"{folder} holds what a run has trained ({kept}) but no checkpoint to go on from: "
            "start another run under EXPERIMENT.NAME, or remove the folder"
        )
    if not resume:
        return []
    if not there:
        raise UserError(
            f"--resume: there is no checkpoint {folder / LATEST}; start without --resume, or give "
            "the same config and overrides as the run to continue"
        )
    if not (folder / "config.yaml").is_file():  # runs of the original recorded none
        return []
    return [*_check_changes(folder, cfg, allow_changes), *side_settings(folder, cfg)]


def _check_changes(folder: Path, cfg: Config, allowed: bool) -> list[str]:
    """The changed settings of a resumed run that influence weights; refuse those that may not."""
    changes = changed_settings(folder, cfg, goes_on=True)
    recorded = recorded_settings(folder)
    data = recorded.get("DATASET", {})
    same = [text for key, text in _AS_BEFORE.items() if key not in data]
    changes = [change for change in changes if change not in same]
    if "RESIZE" not in data and not allowed and stretched(recorded, cfg):
        raise UserError(
            f"--resume: {folder} was begun by an earlier version, which stretched photographs: "
            "set DATASET.RESIZE stretch and DATASET.EXIF False in its config, or give "
            "--allow-changes"
        )
    if not depends_on_epochs(cfg.SOLVER):  # then epochs may be added
        changes = [change for change in changes if not change.startswith("SOLVER.EPOCHS ")]
    if changes and not allowed:
        raise UserError(
            f"--resume: {folder} was started with other settings ({'; '.join(changes)}): "
            "change them back, start another run under EXPERIMENT.NAME, or give --allow-changes"
        )
    fixed = ("EXPERIMENT.SEED ", "LOG.SELECT_BY ", "LOG.PROBE ")
    begun = [text for text in changes if text.startswith(fixed) or ".INIT." in text]
    if begun:
        raise UserError(
            f"--resume: {folder} has begun with what cannot be changed any more "
            f"({'; '.join(begun)}): change it back, or start another run under EXPERIMENT.NAME"
        )
    return changes


def trained_file(folder: Path) -> str | None:
    """A file that proves that a run has trained and saved an epoch.

    A run that died earlier has at most its config, records, and a line of metrics.
    """
    for pattern in ("student_*", "summary.json", "latest.damaged"):
        for path in sorted(folder.glob(pattern)):
            return path.name
    metrics = folder / "metrics.jsonl"
    several = metrics.is_file() and metrics.read_bytes().count(b"\n") > 1
    return metrics.name if several else None
