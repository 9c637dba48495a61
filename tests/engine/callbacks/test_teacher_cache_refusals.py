"""Where the cache of teacher logits cannot work, it is refused."""

import re

import pytest
from teacher_cache_runs import cache_of, config, names, train

from mdistiller.cli import train as train_command
from mdistiller.distillers import DISTILLERS, KD
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError

FUSES = True

REFUSED = {
    r"DISTILLER.TEACHER_CACHE disk: DISTILLER.TYPE FITNET reads more": {"method": "FITNET"},
    r"disk: DISTILLER.TYPE AT reads more of the teacher than logits": {"method": "KD+AT"},
    r"disk: DISTILLER.TYPE OFD has its teacher in train mode": {"method": "OFD"},
    r"disk: DISTILLER.TYPE MLKD reads more": {"method": "MLKD"},
    r"disk: DATASET.AUGMENT rotate_flip": {"text": "DATASET:\n  AUGMENT: rotate_flip\n"},
    r"disk: DATASET.ERASING, MIXUP and CUTMIX": {"text": "DATASET:\n  MIXUP: 0.2\n"},
    r"DATASET.LOADER memory; set it to none": {"text": "DATASET:\n  LOADER: workers\n"},
    r"TEACHER_CACHE must be one of none, memory, disk": {"text": "DISTILLER: {TEACHER_CACHE: y}\n"},
    r"TEACHER_CACHE_GB must be positive, got -1": {"text": "DISTILLER: {TEACHER_CACHE_GB: -1}\n"},
    r"TEACHER_CACHE_GB 1e-09 does not hold": {"text": "DISTILLER: {TEACHER_CACHE_GB: 1.0e-9}\n"},
    r"TRAINER own_step makes its steps itself": {"text": "SOLVER:\n  TRAINER: own_step\n"},
    r"TRAINER own_batch makes its inputs itself": {"text": "SOLVER:\n  TRAINER: own_batch\n"},
    r"TEACHER_CACHE disk: WATCHER watches its teacher": {"method": "WATCHER"},
    r"TEACHER_CACHE disk: the teacher is trained": {"method": "TUNER"},
    r"DISTILLER.TYPE CHANGED reads more": {"method": "CHANGED"},
    r"TEACHER_CACHE_DIR: .* cannot be used": {"text": "DISTILLER: {TEACHER_CACHE_DIR: FILE}\n"},
}


class OwnStep(BaseTrainer):
    def train_iter(self, data, epoch, train_meters):
        return super().train_iter(data, epoch, train_meters)


class OwnBatch(BaseTrainer):
    def batch_inputs(self, data, epoch):
        inputs = super().batch_inputs(data, epoch)
        return {**inputs, "image": inputs["image"].flip(3)}


class Watcher(KD):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        teacher.layer1.register_forward_hook(lambda *call: None)


class Tuner(KD):
    """Trains the teacher's classifier along."""

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.teacher.fc.parameters()]


class Changed(KD):
    """Reads what KD does not, and does not say whether it does."""

    def distill(self, student, teacher, target, **batch):
        return teacher["pooled_feat"].mean() + student.logits.mean()


@pytest.mark.parametrize("message", REFUSED)
def test_where_it_cannot_work_it_is_refused(tmp_path, message, monkeypatch, capsys):
    monkeypatch.setitem(trainer_dict, "own_step", OwnStep)
    monkeypatch.setitem(trainer_dict, "own_batch", OwnBatch)
    for cls in (Watcher, Tuner, Changed):
        monkeypatch.setitem(DISTILLERS, cls.__name__.upper(), cls)
    settings = dict(REFUSED[message])
    (tmp_path / "file").touch()
    settings["text"] = settings.get("text", "").replace("FILE", str(tmp_path / "file"))
    words = [] if "must be one of" in message else ["DISTILLER.TEACHER_CACHE", "disk"]
    path = config(tmp_path, **settings)
    assert train_command.main(["--cfg", str(path), *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors


def test_a_method_without_a_teacher_is_not_bothered(tmp_path):
    rows, _ = train(tmp_path, "disk", method="NONE", epochs=1)
    assert "teacher_hits" not in rows[0]
    assert not names(tmp_path)


def test_a_teacher_that_looks_at_its_batch_is_refused(tmp_path, monkeypatch):
    from mdistiller.frozen_teacher import frozen

    def by_batch(self, image):
        return self.net(image - image.mean(dim=0, keepdim=True))

    monkeypatch.setattr(frozen.FrozenTeacher, "__call__", by_batch)
    monkeypatch.setattr(frozen, "agree", lambda *outputs: True)
    with pytest.raises(UserError, match="depend on more than the image"):
        cache_of(tmp_path)
