"""SOLVER.EMA, and runs with all that training at size has: exact resume, changed settings."""

import json

import pytest
import torch
import yaml
from support import same_state, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.distillers import DISTILLERS
from mdistiller.distillers.KD import KD
from mdistiller.engine import trainer_dict
from mdistiller.engine.callbacks.ema import AverageStudent
from mdistiller.engine.hooks import Hook

TIMES = ("time", "seconds", "images_per_second")


def train(folder, *words, code=0, **config):
    folder.mkdir(exist_ok=True)
    path = write_config(folder, **config)
    assert train_command.main(["--cfg", str(path), *words]) == code
    return folder / "out" / "toy" / "run"


def load(path):
    return torch.load(path, weights_only=True)


def rows(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def test_the_average_follows_every_step(tmp_path, monkeypatch):
    """Against the recurrence in float64; counters are copied; files and summary tell the best."""
    states = []

    class Keep(Hook):
        def after_update(self, trainer):
            states.append({k: v.clone() for k, v in trainer.model.student.state_dict().items()})

    class Keeps(trainer_dict["base"]):
        def __init__(self, *args):
            super().__init__(*args)
            self.hooks.append(Keep())

    monkeypatch.setitem(trainer_dict, "base", Keeps)
    solver = "SOLVER:\n  EMA: 0.8\n  ACCUMULATE: 2\nDATASET:\n  VAL_SPLIT: 20\n"
    run = train(tmp_path, text=solver, epochs=3)
    assert len(states) == 3 * 3  # 140 images, batches of 32 in pairs
    average = load(run / "student_ema_latest")["model"]
    for key, value in average.items():
        if not value.is_floating_point():
            assert torch.equal(value, states[-1][key])
            continue
        want = states[0][key].double()
        for state in states[1:]:
            want = 0.8 * want + 0.2 * state[key].double()
        torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, states[-1][key])
    found, summary = rows(run), json.loads((run / "summary.json").read_text())
    assert {"ema_test_acc", "ema_test_acc_top5", "ema_test_loss"} <= set(found[0])
    assert summary["ema_last_acc"] == found[-1]["ema_test_acc"]
    assert summary["ema_best_acc"] == max(row["ema_test_acc"] for row in found)
    assert found[summary["ema_best_epoch"] - 1]["ema_test_acc"] == summary["ema_best_acc"]
    assert {"ema_test_acc_last", "ema_test_acc_best"} <= set(summary)
    with pytest.raises(AssertionError):
        assert same_state(average, load(run / "student_latest")["model"])


@pytest.mark.parametrize("trainer", ["base", pytest.param("dot", marks=pytest.mark.slow)])
def test_resume_is_exact_to_the_bit(tmp_path, monkeypatch, trainer):
    """Killed within the second epoch, between two micro-batches of one step."""
    kind = trainer_dict[trainer]

    class Stops(kind):
        armed = False

        def batch_inputs(self, data, epoch):
            if Stops.armed and (epoch, self.step) == (2, 2):
                raise KeyboardInterrupt
            return super().batch_inputs(data, epoch)

    monkeypatch.setitem(trainer_dict, trainer, Stops)
    settings = {
        "method": "KD",
        "student": "BabyTeacher",  # with batch norm and dropout
        "epochs": 2,
        "TEACHER": "resnet8",
        "TEACHER_CKPT": str(saved_teacher(tmp_path)),
        "text": f"SOLVER:\n  TRAINER: {trainer}\n  EMA: 0.7\n  ACCUMULATE: 2\n  LR: 0.01\n"
        "  CLIP_GRAD_NORM: 1.0\n  WARMUP_EPOCHS: 1\n  SCHEDULE: cosine\n",
    }
    whole = train(tmp_path / "whole", **settings)
    Stops.armed = True
    stopped = train(tmp_path / "stopped", code=130, **settings)
    assert load(stopped / "latest")["epoch"] == 1
    Stops.armed = False
    train(tmp_path / "stopped", "--resume", **settings)
    first, second = (load(run / "latest") for run in (whole, stopped))
    assert same_state(first["model"], second["model"])
    assert same_state(first["ema"]["model"], second["ema"]["model"])
    assert first["ema"]["best_acc"] == second["ema"]["best_acc"]
    assert first["ema"]["best_epoch"] == second["ema"]["best_epoch"]
    for one, two in zip(*(s["optimizer"]["state"].values() for s in (first, second)), strict=True):
        assert same_state(one, two)
    assert rows(whole) == rows(stopped)
    for name in ("student_ema_latest", "student_ema_best"):
        assert same_state(load(whole / name)["model"], load(stopped / name)["model"])


def test_changed_settings_know_the_new_keys(tmp_path, capsys):
    """What decides about weights is compared; a run from before a key ran with its default."""
    run = train(tmp_path, student="BabyStudent", epochs=1)
    for key, value in (("ACCUMULATE", 2), ("EMA", 0.5), ("SYNC_BN", True)):
        text = f"SOLVER:\n  {key}: {value}\n"
        for recorded in (True, False):
            if not recorded:
                record = yaml.safe_load((run / "config.yaml").read_text())
                del record["SOLVER"][key]
                (run / "config.yaml").write_text(yaml.safe_dump(record))
            train(tmp_path, "--resume", code=2, student="BabyStudent", epochs=1, text=text)
            assert f"SOLVER.{key} was" in capsys.readouterr().err
    train(tmp_path, "--resume", student="BabyStudent", epochs=1)
    text = "SOLVER:\n  COMPILE: True\n"
    train(tmp_path, "--resume", student="BabyStudent", epochs=1, text=text)


def test_a_student_with_another_head_is_averaged_with_it(tmp_path):
    teacher = str(saved_teacher(tmp_path))
    settings = {"method": "SIMKD", "TEACHER": "resnet8", "TEACHER_CKPT": teacher, "epochs": 1}
    run = train(tmp_path, text="SOLVER:\n  EMA: 0.5\n", **settings)
    assert any(key.startswith("neck.") for key in load(run / "student_ema_best")["model"])
    assert "ema_test_acc" in rows(run)[0]


def test_a_method_that_predicts_with_more_than_the_student_is_refused(
    tmp_path, capsys, monkeypatch
):
    class More(KD):
        def forward_test(self, image):
            return self.student(image)[0] + self.teacher(image)[0]

    monkeypatch.setitem(DISTILLERS, "KD", More)
    settings = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(tmp_path)), "epochs": 1}
    train(tmp_path, code=2, method="KD", text="SOLVER:\n  EMA: 0.5\n", **settings)
    assert "SOLVER.EMA averages the student alone, but KD predicts" in capsys.readouterr().err


def test_without_a_decay_there_is_no_average(tmp_path):
    run = train(tmp_path, student="BabyStudent", epochs=1)
    assert not list(run.glob("student_ema*"))
    assert "ema" not in load(run / "latest")
    assert AverageStudent().best_epoch == 0
