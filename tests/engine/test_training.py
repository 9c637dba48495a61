"""Runs of the whole engine on 160 real digits: files, schedules, precision, what is best."""

import json

import pytest
import torch
from support import same_state, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import load_config
from mdistiller.models import get_model_entry


def train(folder, *words, **config):
    """Train the toy config in this process; returns the run folder."""
    path = write_config(folder, **config)
    assert train_command.main(["--cfg", str(path), *map(str, words)]) == 0
    return folder / "out" / "toy" / "run"


def load(path):
    return torch.load(path, weights_only=True)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run):
    times = {"time", "seconds", "images_per_second"}
    return [{k: v for k, v in row.items() if k not in times} for row in metrics(run)]


def test_a_run_leaves_the_files_of_the_original(tmp_path):
    run = train(tmp_path, epochs=3, text="LOG:\n  SAVE_CHECKPOINT_FREQ: 2\n")
    names = {p.name for p in run.iterdir()}
    assert names == {
        *("latest", "best", "epoch_2", "student_latest", "student_best", "student_2"),
        *("previous", "checkpoints.json", ".lock"),
        *("worklog.txt", "metrics.jsonl", "train.events"),
        *("config.yaml", "run.json", "summary.json"),
    }
    latest = load(run / "latest")
    assert latest["epoch"] == 3
    assert {"model", "optimizer", "best_acc"} <= set(latest)
    student = get_model_entry("resnet8", "cifar")(num_classes=10)
    student.load_state_dict(load(run / "student_latest")["model"])
    assert same_state({f"student.{k}": v for k, v in student.state_dict().items()}, latest["model"])
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert latest["best_acc"] == max(row["test_acc"] for row in rows)
    best = load(run / "best")
    assert rows[best["epoch"] - 1]["test_acc"] == latest["best_acc"]

    lines = (run / "worklog.txt").read_text().split("\n")
    keys = ["lr", "train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss"]
    assert lines[0] == lines[8] == "-" * 25
    assert lines[1] == "epoch: 1"
    assert lines[2:8] == [f"{key}: {rows[0][key]:.2f}" for key in keys]
    assert lines[-1] == f"best_acc\t{latest['best_acc']:.2f}"

    record = json.loads((run / "run.json").read_text())["starts"][0]
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert "SOLVER" in (run / "config.yaml").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_epoch"] == best["epoch"]
    assert summary["last_acc"] == rows[-1]["test_acc"]
    assert summary["selected_on"] == "test set"


def test_the_same_seed_repeats_a_run_and_another_does_not(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    first, again = train(tmp_path / "a", epochs=1), train(tmp_path / "b", epochs=1)
    assert untimed(first) == untimed(again)
    folder = train(tmp_path / "c", "EXPERIMENT.SEED", 1, epochs=1).parent
    other = untimed(folder / "run-seed=1")
    assert other[0]["train_loss"] != untimed(first)[0]["train_loss"]


def test_a_plateau_lowers_the_rate_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    """Epochs 3 to 5 improve nothing, one more than PATIENCE: a tenth from epoch 6 on."""
    losses = iter([2.0, 1.0, 1.0, 1.5, 1.0, 0.9, 0.8, 0.9, 0.95, 0.9])

    class Scripted(trainer_dict["base"]):
        def train_iter(self, data, epoch, train_meters):
            if self.step == 1:
                self.loss = next(losses)
            train_meters["losses"].update(self.loss)
            return ""

    monkeypatch.setitem(trainer_dict, "base", Scripted)
    text = "SOLVER: {TYPE: Adam, LR: 1.0, SCHEDULE: plateau, PATIENCE: 2}\n"
    run = train(tmp_path, epochs=4, text=text)
    train(tmp_path, "--resume", epochs=10, text=text)
    rates = [1.0] * 5 + [0.1] * 5
    assert [row["lr"] for row in metrics(run)] == pytest.approx(rates)
    (run / "checkpoints.json").unlink()  # as earlier versions left it
    state = load(run / "latest")
    del state["scheduler"], state["history"]
    torch.save(state, run / "latest")
    assert (
        train_command.main(["--cfg", str(write_config(tmp_path, text, epochs=11)), "--resume"]) == 2
    )
    assert "holds no schedule, and a plateau" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])  # SGD learns above
def test_every_optimizer_learns(tmp_path, kind):
    text = f"SOLVER:\n  TYPE: {kind}\n  LR: 0.002\n"
    rows = metrics(train(tmp_path, epochs=2, text=text))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_mixed_precision_trains_close_to_full(tmp_path):
    teacher = str(saved_teacher(tmp_path))
    for name in ("full", "bf16", "fp16"):
        (tmp_path / name).mkdir()
    settings = {"method": "DKD", "TEACHER": "resnet8", "TEACHER_CKPT": teacher, "epochs": 1}
    full = metrics(train(tmp_path / "full", **settings))
    for amp in ("bf16", "fp16"):
        text = f"SOLVER:\n  AMP: {amp}\n  CLIP_GRAD_NORM: 1000.0\n"
        half = metrics(train(tmp_path / amp, text=text, **settings))
        assert half[0]["train_loss"] != full[0]["train_loss"], amp
        assert half[0]["train_loss"] == pytest.approx(full[0]["train_loss"], rel=0.05), amp


def test_clipping_bounds_the_step(tmp_path):
    """One SGD step without momentum and decay moves the weights by at most LR x the limit."""
    text = (
        "SOLVER:\n  BATCH_SIZE: 160\n  MOMENTUM: 0.0\n  WEIGHT_DECAY: 0.0\n  LR: 0.5\n"
        "  CLIP_GRAD_NORM: 0.01\n"
    )
    run = train(tmp_path, epochs=1, text=text)
    from mdistiller.engine.trainer import seed_everything

    seed_everything(0)
    start = get_model_entry("resnet8", "cifar")(num_classes=10)
    end = load(run / "student_latest")["model"]
    moved = sum(((end[k] - p.detach()) ** 2).sum() for k, p in start.named_parameters()) ** 0.5
    assert moved.item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_ties_are_kept_by_the_later_epoch_in_files_and_summary(tmp_path):
    """A learning rate of nearly nothing: every epoch scores the same."""
    run = train(tmp_path, epochs=3, text="SOLVER:\n  LR: 1.0e-30\n  MOMENTUM: 0.0\n")
    rows = metrics(run)
    tied = [row["epoch"] for row in rows if row["test_acc"] == max(r["test_acc"] for r in rows)]
    summary = json.loads((run / "summary.json").read_text())
    assert load(run / "best")["epoch"] == summary["best_epoch"] == tied[-1]
    assert len(tied) > 1 or tied == [3]


def test_held_out_images_select_and_the_test_set_is_used_at_the_end(tmp_path):
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(tmp_path))}
    text = "DATASET:\n  VAL_SPLIT: 40\n"
    run = train(tmp_path, epochs=3, text=text, method="KD", **teacher)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["selected_on"] == "40 held-out training images"
    assert {"test_acc_last", "test_acc_best"} <= set(summary)
    scores = [row["test_acc"] for row in metrics(run)]
    assert all(score * 40 / 100 == pytest.approx(round(score * 40 / 100)) for score in scores)
    # The selected weights' test accuracy, measured independently.
    net = get_model_entry("resnet8", "cifar")(num_classes=10)
    net.load_state_dict(load(run / "student_best")["model"])
    from mdistiller.dataset import load_test_loader
    from mdistiller.distillers import Vanilla
    from mdistiller.engine.utils import validate

    loader = load_test_loader(load_config(tmp_path / "toy.yaml")).loader
    assert validate(loader, Vanilla(net))[0] == pytest.approx(summary["test_acc_best"])
    # The teacher's too: held-out images may be ones that it was trained on.
    net.load_state_dict(load(teacher["TEACHER_CKPT"])["model"])
    assert validate(loader, Vanilla(net))[0] == pytest.approx(summary["teacher_acc"])
    assert summary["teacher_acc"] * 40 / 100 % 1 != pytest.approx(0)  # so it is not of those


NON_FINITE = """
from mdistiller.distillers import DISTILLERS, Distiller

@DISTILLERS.register("Diverges")
class Diverges(Distiller):
    def distill(self, student, teacher, target, *, epoch, **batch):
        self.calls = getattr(self, "calls", 0) + 1
        return student.logits.sum() * (float("nan") if self.calls == 8 else 0.0)
"""


def test_a_non_finite_loss_stops_with_every_term_epoch_and_step(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(NON_FINITE)
    teacher = saved_teacher(tmp_path)
    config = write_config(tmp_path, method="Diverges", TEACHER="resnet8", TEACHER_CKPT=str(teacher))
    code = train_command.main(["--cfg", str(config), "--import", str(tmp_path / "bad.py")])
    assert code == 2
    error = capsys.readouterr().err
    assert "non-finite loss in epoch 2, step 3: loss_ce=" in error
    assert "loss_kd=nan" in error
    assert error.count("\n") == 1
    latest = load(tmp_path / "out" / "toy" / "run" / "latest")
    assert latest["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in latest["model"].values())
