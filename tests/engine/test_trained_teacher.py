"""Teachers that a config trains first, and where their weights come from."""

import json

import pytest
import torch
from support import saved_teacher, write_config
from test_training import load, train

from mdistiller.cli import train as train_command
from mdistiller.run import prepare as run_module


def test_a_teacher_is_never_trained_in_the_students_folder(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    teacher = write_config(tmp_path / "t", epochs=1, student="resnet14")  # of the same NAME
    settings = {"method": "KD", "TEACHER": "resnet14", "TEACHER_CFG": str(teacher)}
    path = write_config(tmp_path, **settings)
    assert train_command.main(["--cfg", str(path)]) == 2
    error = capsys.readouterr().err
    assert "would be the folder of the student and of the teacher" in error
    assert "EXPERIMENT.NAME" in error
    assert not list((tmp_path / "out").rglob("latest"))


def test_the_teacher_config_is_trained_once_first(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    teacher = write_config(tmp_path / "t", epochs=1, student="resnet14")
    teacher.write_text(teacher.read_text() + "EXPERIMENT:\n  NAME: teacher\n")
    settings = {"method": "KD", "TEACHER": "resnet14", "TEACHER_CFG": str(teacher), "epochs": 1}
    run = train(tmp_path, **settings)
    assert "training the teacher first" in capsys.readouterr().out
    made = load(tmp_path / "out" / "toy" / "teacher" / "student_latest")["model"]
    used = load(run / "latest")["model"]
    assert all(torch.equal(used[f"teacher.{key}"], value) for key, value in made.items())
    summary = json.loads((run / "summary.json").read_text())
    first = json.loads((run.parent / "teacher" / "summary.json").read_text())
    assert summary["teacher_acc"] == first["last_acc"]

    for name in ("latest", "best"):  # the student alone is enough
        (run.parent / "teacher" / name).unlink()
    harmless = ["DATASET.NUM_WORKERS", 1, "DATASET.TEST.BATCH_SIZE", 30]
    train(tmp_path, "EXPERIMENT.SEED", 1, *harmless, **settings)
    out = capsys.readouterr().out
    assert "training the teacher first" not in out
    assert f"accuracy {summary['teacher_acc']:.2f} %" in out

    teacher.write_text(teacher.read_text() + "SOLVER:\n  EPOCHS: 2\n")
    words = ["--cfg", str(tmp_path / "toy.yaml"), "EXPERIMENT.SEED", "2"]
    assert train_command.main(words) == 2
    assert "SOLVER.EPOCHS was 1, is now 2" in capsys.readouterr().err


def test_a_resumed_run_measures_its_teacher_once(tmp_path, monkeypatch, capsys):
    """Unless a setting has changed that may decide what is measured."""
    measured, original = [], run_module.measure_teachers

    def measure(*args):
        measured.extend(original(*args))
        return measured[-1:]

    monkeypatch.setattr(run_module, "measure_teachers", measure)
    teacher = str(saved_teacher(tmp_path))
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CKPT": teacher}
    run = train(tmp_path, epochs=1, **settings)
    train(tmp_path, "--resume", epochs=2, **settings)
    (first,) = measured
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["epochs"], summary["teacher_acc"]) == (2, first)
    assert f"accuracy {first:.2f} % (measured when the run began)" in capsys.readouterr().out
    text = "DATASET: {TEST: {BATCH_SIZE: 30}}\n"
    train(tmp_path, "--resume", epochs=2, text=text, **settings)
    assert len(measured) == 2


def test_the_zoos_teacher_goes_before_the_config_that_trains_one(tmp_path, monkeypatch, capsys):
    from mdistiller.models import ModelEntry, cifar_model_dict

    path = str(saved_teacher(tmp_path, num_classes=10))
    entry = cifar_model_dict["resnet8"]

    def ten(num_classes=10):
        return entry.constructor(num_classes=num_classes)

    (tmp_path / "t").mkdir()
    config = str(write_config(tmp_path / "t", epochs=1))
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CFG": config, "epochs": 1}
    monkeypatch.setitem(cifar_model_dict, "resnet8", ModelEntry(ten, path))
    run = train(tmp_path, **settings)
    assert "training the teacher first" not in capsys.readouterr().out
    used, released = load(run / "latest")["model"], load(path)["model"]
    assert all(torch.equal(used[f"teacher.{key}"], value) for key, value in released.items())
    # Released for 100 classes, it is none for this data: the config is what counts then.
    monkeypatch.setitem(cifar_model_dict, "resnet8", ModelEntry(entry.constructor, path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdistiller.run.teacher.train_teacher", lambda *_: path)
        train(tmp_path, "EXPERIMENT.NAME", "second", **settings)
