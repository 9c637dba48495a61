"""The summary of a run: its last and best accuracy, and what the best was selected on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.utils import last_and_best
from mdistiller.run_folder.folder import read_lines


def summarize(trainer: BaseTrainer, data: Any, teacher_acc: float | None) -> dict[str, Any]:
    """The summary: last and best accuracy, and the images that the best was selected on.

    With DATASET.VAL_SPLIT the test set is used here, once, for the last and the selected weights.
    """
    history = trainer.history
    timed = [(r.get("seconds", 0.0), r.get("images_per_second", 0.0)) for r in history]
    seconds = sum(seconds for seconds, _ in timed)
    images = sum(seconds * rate for seconds, rate in timed)  # epochs may be of different lengths
    rate = images / seconds if seconds else None
    seconds += stage_seconds(trainer.log_path)
    best = trainer.best()
    summary: dict[str, Any] = {
        "epochs": trainer.epoch,
        f"last_{kind_of(best)}": history[-1].get(trainer.selects) if history else None,
        **best,
        "best_epoch": trainer.best_epoch,
        "selected_on": trainer.selected_on or getattr(data, "val_name", "test set"),
        "selected_by": trainer.select_by,
        "teacher_acc": teacher_acc,
        "seconds": seconds,
        "images_per_second": rate,
        "parameters": sum(p.numel() for p in trainer.model.student.parameters()),
    }
    for name in ("balanced_acc", "macro_f1", "knn"):
        key = f"test_{name}"
        values = {record["epoch"]: record[key] for record in history if key in record}
        if trainer.epoch in values:
            summary[f"last_{name}"] = values[trainer.epoch]
            summary[f"best_{name}"] = values.get(trainer.best_epoch)
    hits = [record["teacher_hits"] for record in history if "teacher_hits" in record]
    if hits:
        summary["teacher_hits"] = sum(hits) / len(hits)
    if data.test is not None:
        summary |= last_and_best(trainer.model, trainer.log_path / "best", data.test)
    for hook in trainer.hooks:
        summary |= hook.summarize(trainer, data)
    return summary


def kind_of(numbers: Mapping[str, Any]) -> str:
    """What a summary's last and best number are: "acc" or "knn", in percent, or "loss"."""
    return next(kind for kind in ("acc", "loss", "knn") if f"best_{kind}" in numbers)


def stage_seconds(folder: Path) -> float:
    """Seconds of the initialisation stages, from the run's metrics."""
    rows = read_lines(folder / "metrics.jsonl")
    return sum(row.get("seconds", 0.0) for row in rows if "stage" in row)


def describe(summary: dict[str, Any], folder: Path) -> str:
    """The summary in one or two lines."""
    kind, by = kind_of(summary), summary.get("selected_by", "top1")
    last, best = (summary[f"{which}_{kind}"] for which in ("last", "best"))
    what, digits = {"acc": ("", 2), "loss": ("loss ", 4), "knn": ("k-NN ", 2)}[kind]
    by = "" if by == "top1" else f"by {by.replace('_', ' ')} "
    text = (
        f"done: {what}last {'unknown' if last is None else f'{last:.{digits}f}'}, best "
        f"{best:.{digits}f} in epoch {summary['best_epoch']} (selected {by}on the "
        f"{summary['selected_on']})"
    )
    if "test_acc_best" in summary:
        text += (
            f"; on the test set: last {summary['test_acc_last']:.2f}, "
            f"selected {summary['test_acc_best']:.2f}"
        )
    if "teacher_hits" in summary:
        text += f"; the teacher cache saved {summary['teacher_hits']:.1f} % of the teacher's passes"
    return f"{text}; files in {folder}"
