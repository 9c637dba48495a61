"""Run folders that were never trained, written by the code that writes real ones, and reports."""

import json
from types import SimpleNamespace

import torch
from torch import nn

from mdistiller.config.values import flatten, lookup
from mdistiller.engine.callbacks.logs import MetricsFile
from mdistiller.engine.cfg import default_config
from mdistiller.run.summary import summarize
from mdistiller.run_folder.record import write_record

METHODS = {"plain": ("DISTILLER.TYPE", "NONE"), "KD": ("DISTILLER.TYPE", "KD")}
ENDS = {"plain": (70.0, 71.0, 72.0), "KD": (71.0, 73.0, 75.0)}


def config(*pairs):
    """The default config, changed by `KEY, VALUE, ...`, with a run of ten epochs."""
    cfg = default_config()
    cfg.merge_from_list(["SOLVER.EPOCHS", 10, *pairs])
    return cfg


def make_run(folder, accuracies, *pairs, seed=0, teacher=None, finished=True, test=None):
    """A run with an accuracy for each epoch; `folder` is the run's own.

    Args:
        test: accuracies on the test set of the last and the best epoch, of a run that held out
            images.
    """
    cfg = config("EXPERIMENT.SEED", seed, *pairs)
    write_record(folder, cfg, torch.device("cpu"))
    log, history = MetricsFile(), []
    for epoch, accuracy in enumerate(accuracies, 1):
        record = {"lr": 0.1, "train_acc": accuracy, "train_loss": 1 / epoch, "test_acc": accuracy}
        record |= {"train_loss_ce": 0.6 / epoch, "train_loss_kd": 0.4 / epoch, "seconds": 2.0}
        record |= {"test_loss": 2 / epoch, "images_per_second": 500.0}
        log.write(SimpleNamespace(log_path=folder, stage=""), epoch, record)
        history.append({"epoch": epoch, **record})
    if finished:
        best = max(accuracies)
        trainer = SimpleNamespace(
            history=history,
            selects="test_acc",
            select_by="top1",
            log_path=folder,
            epoch=len(accuracies),
            best_acc=best,
            best_epoch=accuracies.index(best) + 1,
            best=lambda: {"best_acc": best},
            selected_on="",
            model=SimpleNamespace(student=nn.Linear(4, 2)),
            hooks=[],
        )
        summary = summarize(trainer, SimpleNamespace(test=None), teacher)
        if test is not None:
            summary |= {"selected_on": "500 held-out training images"}
            summary |= dict(zip(("test_acc_last", "test_acc_best"), test, strict=True))
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rows(report, title):
    """The cells of a section's first table, by the name of the row."""
    (section,) = (s for s in report.sections if s.title == title)
    return {row[0]: row[1:] for row in section.tables[0].rows}


def flat(cfg):
    return {key: lookup(cfg, key) for key in flatten(cfg)}
