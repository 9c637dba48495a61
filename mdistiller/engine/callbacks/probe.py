"""LOG.PROBE: the k-NN accuracy of the student's features, every few epochs."""

from __future__ import annotations

from typing import Any

from mdistiller.dataset import data_spec
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.probe import labelled_config, labelled_sets, probe
from mdistiller.preprocessing import read_preprocessing
from mdistiller.registry import UserError

KEY = "test_knn"


class Probe(Hook):
    """Adds `test_knn`, in percent, to the record of every LOG.PROBE_FREQ-th and the last epoch.

    The labelled images of LOG.PROBE are resized, cropped and normalised as the student's file
    records, which `eval --probe` follows as well.
    """

    def __init__(self) -> None:
        self.sets: Any = None

    def before_train(self, trainer: Trainer) -> None:
        cfg = labelled_config(trainer.cfg, trainer.cfg.LOG.PROBE)
        facts: Any = trainer.model.student.file_entries["data"]
        cfg.defrost()
        cfg.DATASET.MEAN, cfg.DATASET.STD = facts["mean"], facts["std"]
        height, width = facts["image_size"]
        if height == width:
            cfg.DATASET.IMAGE_SIZE = height
        cfg.freeze()
        recorded = read_preprocessing(facts.get("preprocessing")) if data_spec(cfg).files else None
        self.sets = labelled_sets(cfg, trainer.device, recorded)
        size = self.sets[1].image_size
        if size != (height, width):
            raise UserError(
                f"LOG.PROBE {trainer.cfg.LOG.PROBE}: its images are {size[1]}x{size[0]} pixels and "
                f"those of training {width}x{height}; name a folder, whose images are resized"
            )

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        if epoch % trainer.cfg.LOG.PROBE_FREQ == 0 or epoch == trainer.epochs:
            train, test = self.sets
            record[KEY] = probe(trainer.model.student, train, test, trainer.device)["knn"]
