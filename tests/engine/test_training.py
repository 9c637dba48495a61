"""Runs of the whole engine on 160 real digits: files, schedules, resume, teacher, precision."""

import json
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from support import REPO, command, run_script, same_state, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import load_config
from mdistiller.models import get_model_entry
from mdistiller.run import prepare as run_module
from mdistiller.run_folder.changes import changed_settings


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


KILL = """
import os, signal
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

@trainer_dict.register("killed")
class Killed(BaseTrainer):
    def train_iter(self, data, epoch, train_meters):
        if (epoch, self.step) == (2, 2) and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_iter(data, epoch, train_meters)
"""


def test_resume_after_sigkill_is_exact_to_the_bit(tmp_path, monkeypatch):
    """A student with batch norm and dropout: order, views, dropout, momentum all continue.

    In a Python of its own, which has other hashes, and which ends by itself beside a worker.
    """
    (tmp_path / "kill.py").write_text(KILL)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    settings = {
        "method": "DKD",
        "student": "BabyTeacher",
        "epochs": 2,
        "TEACHER": "resnet8",
        "TEACHER_CKPT": str(saved_teacher(tmp_path)),
        "text": "SOLVER:\n  TRAINER: killed\n  LR: 0.01\n"
        "DATASET: {LOADER: workers, NUM_WORKERS: 1}\n",
    }
    words = ["--import", tmp_path / "kill.py"]
    whole = command("--cfg", write_config(tmp_path / "whole", **settings), *words)
    assert whole.returncode == 0, whole.stderr
    config = write_config(tmp_path / "killed", **settings)
    monkeypatch.setenv("KILL", "1")
    assert command("--cfg", config, *words).returncode == -signal.SIGKILL
    runs = [tmp_path / name / "out" / "toy" / "run" for name in ("whole", "killed")]
    assert load(runs[1] / "latest")["epoch"] == 1
    # Half a line that the dead process left behind must not survive.
    with (runs[1] / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "lr"')
    monkeypatch.delenv("KILL")
    resumed = command("--cfg", config, *words, "--resume", prefix=[sys.executable])
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load(run / "latest") for run in runs)
    assert first["epoch"] == second["epoch"] == 2
    assert same_state(first["model"], second["model"])
    buffers = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
        for state in (first, second)
    ]
    assert all(map(torch.equal, *buffers))
    assert untimed(runs[0]) == untimed(runs[1])
    assert (runs[0] / "worklog.txt").read_text() == (runs[1] / "worklog.txt").read_text()


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    run = train(tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name in ("latest", "worklog.txt")}
    path = str(tmp_path / "toy.yaml")
    assert train_command.main(["--cfg", path, "--resume"]) == 0
    assert all((run / name).read_bytes() == old for name, old in before.items())
    assert len(metrics(run)) == 2


def test_a_checkpoint_of_the_original_resumes(tmp_path):
    """Wrapped keys, numpy numbers, no schedule: the rate follows from the epoch."""
    run = train(tmp_path, epochs=2)
    state = load(run / "latest")
    old = {
        "epoch": 2,
        "model": {f"module.{key}": value for key, value in state["model"].items()},
        "optimizer": state["optimizer"],
        "best_acc": np.float64(12.5),
    }
    old["optimizer"]["param_groups"][0]["lr"] = np.float64(0.005)
    torch.save(old, run / "latest")
    (run / "checkpoints.json").unlink()  # the original wrote none
    path = write_config(tmp_path, epochs=3)
    assert train_command.main(["--cfg", str(path), "--resume"]) == 0
    assert metrics(run)[-1]["epoch"] == 3
    assert metrics(run)[-1]["lr"] == pytest.approx(0.005)


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


@pytest.fixture(scope="module")
def in_32s(tmp_path_factory):
    """A run of one process in batches of 32."""
    return train(tmp_path_factory.mktemp("in_32s"), epochs=1)


@pytest.mark.parametrize(
    ("split", "processes", "refusal"),
    [
        ({}, 2, "1 processes took 32 images a step, 2 now would take 64"),
        ({"BATCH_SIZE": 16}, 2, None),
        ({"BATCH_SIZE": 16, "ACCUMULATE": 2}, 1, None),
        ({"BATCH_SIZE": 16}, 1, "SOLVER.BATCH_SIZE was 32, is now 16"),
    ],
)
def test_a_run_goes_on_with_as_many_images_a_step(
    in_32s, tmp_path, monkeypatch, split, processes, refusal
):
    solver = "".join(f"  {key}: {value}\n" for key, value in split.items())
    cfg = load_config(write_config(tmp_path, f"SOLVER:\n{solver}" if split else "", epochs=1))
    monkeypatch.setattr("mdistiller.run_folder.changes.world_size", lambda: processes)
    changes = changed_settings(in_32s, cfg, goes_on=True)
    if refusal is None:
        assert changes == []
    else:
        assert any(refusal in change for change in changes)


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


def test_ties_are_kept_by_the_later_epoch_in_files_and_summary(tmp_path):
    """A learning rate of nearly nothing: every epoch scores the same."""
    run = train(tmp_path, epochs=3, text="SOLVER:\n  LR: 1.0e-30\n  MOMENTUM: 0.0\n")
    rows = metrics(run)
    tied = [row["epoch"] for row in rows if row["test_acc"] == max(r["test_acc"] for r in rows)]
    summary = json.loads((run / "summary.json").read_text())
    assert load(run / "best")["epoch"] == summary["best_epoch"] == tied[-1]
    assert len(tied) > 1 or tied == [3]


def test_resume_refuses_other_mathematics_and_takes_more_epochs(tmp_path, capsys):
    run = train(tmp_path, epochs=2)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    for text, says in (
        ("SOLVER:\n  LR: 0.2\n", "SOLVER.LR was 0.05, is now 0.2"),
        ("EXPERIMENT:\n  SEED: 3\n", "EXPERIMENT.SEED was 0, is now 3"),
        ("SOLVER:\n  EPOCHS: 3\n  SCHEDULE: cosine\n", "SOLVER.SCHEDULE was multistep"),
    ):
        path = write_config(tmp_path, text=text)
        assert train_command.main(["--cfg", str(path), "--resume"]) == 2
        assert says in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    path = write_config(tmp_path, epochs=3)
    assert train_command.main(["--cfg", str(path), "--resume"]) == 0
    assert [row["epoch"] for row in metrics(run)] == [1, 2, 3]


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


README_METHOD = """
import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller


class MyDistiller(Distiller):
    def __init__(self, student, teacher, cfg):
        super(MyDistiller, self).__init__(student, teacher)
        self.weight = cfg.MyDistiller.WEIGHT
        self.extra = nn.Linear(10, 10)

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        loss_ce = F.cross_entropy(logits_student, target)
        loss_kd = self.weight * F.mse_loss(self.extra(logits_student), logits_teacher)
        return logits_student, {"loss_ce": loss_ce, "loss_kd": loss_kd}

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.extra.parameters())
"""


ANEW = """
import runpy, sys
from pathlib import Path

for name in [name for name in sys.modules if name.partition(".")[0] == "mdistiller"]:
    del sys.modules[name]
copy = Path(sys.argv.pop(1))
sys.path.insert(0, str(copy))
sys.argv[0] = str(copy / "tools" / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("place", ["imports", "package"])
def test_a_distiller_of_the_original_trains_unchanged(tmp_path, place):
    """One file, no registration: named in IMPORTS, or dropped into distillers/."""
    if place == "imports":
        (tmp_path / "mine.py").write_text(README_METHOD)
        words = ["--import", str(tmp_path / "mine.py")]
    else:
        for folder in ("mdistiller", "tools", "configs"):
            shutil.copytree(REPO / folder, tmp_path / "copy" / folder)
        shutil.copy(REPO / "pyproject.toml", tmp_path / "copy")
        (tmp_path / "copy" / "mdistiller" / "distillers" / "mine.py").write_text(README_METHOD)
        (tmp_path / "anew.py").write_text(ANEW)
    config = write_config(
        tmp_path,
        method="MyDistiller",
        TEACHER="resnet8",
        TEACHER_CKPT=str(saved_teacher(tmp_path)),
        text="MyDistiller:\n  WEIGHT: 0.5\n",
    )
    if place == "imports":
        assert train_command.main(["--cfg", str(config), *words]) == 0
    else:
        done = run_script(tmp_path / "anew.py", tmp_path / "copy", "--cfg", config)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "toy" / "run"
    rows = metrics(run)
    assert rows[-1]["train_loss_kd"] < rows[0]["train_loss_kd"]
    groups = load(run / "latest")["optimizer"]["param_groups"]
    network = get_model_entry("resnet8", "cifar")(num_classes=10)
    assert len(groups[0]["params"]) == len(list(network.parameters())) + 2  # extra counts once
    state = load(run / "latest")["model"]
    assert "extra.weight" in state


OLD_TRAINER = """
import torch
from mdistiller.engine import trainer_dict
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.utils import (
    AverageMeter, accuracy, validate, adjust_learning_rate, save_checkpoint, load_checkpoint,
    log_msg,
)


class OldTrainer(BaseTrainer):
    def __init__(self, experiment_name, distiller, train_loader, val_loader, cfg):
        super(OldTrainer, self).__init__(experiment_name, distiller, train_loader, val_loader, cfg)

    def train_iter(self, data, epoch, train_meters):
        self.optimizer.zero_grad()
        image, target, index = data
        preds, losses_dict = self.distiller(image=image, target=target, epoch=epoch)
        loss = sum([l.mean() for l in losses_dict.values()])
        loss.backward()
        self.optimizer.step()
        batch_size = image.size(0)
        acc1, acc5 = accuracy(preds, target, topk=(1, 5))
        train_meters["losses"].update(loss.cpu().detach().numpy().mean(), batch_size)
        train_meters["top1"].update(acc1[0], batch_size)
        train_meters["top5"].update(acc5[0], batch_size)
        return "Loss:{:.4f}".format(train_meters["losses"].avg)


class OlderTrainer(OldTrainer):
    def train_epoch(self, epoch):
        lr = adjust_learning_rate(epoch, self.cfg, self.optimizer)
        train_meters = {name: AverageMeter() for name in ("losses", "top1", "top5")}
        self.distiller.train()
        for idx, data in enumerate(self.train_loader):
            msg = self.train_iter(data, epoch, train_meters)
        test_acc, test_acc_top5, test_loss = validate(self.val_loader, self.distiller)
        test_acc = torch.tensor([test_acc], dtype=torch.float64)  # as the original's validate
        log_dict = {
            "train_acc": train_meters["top1"].avg,
            "train_loss": train_meters["losses"].avg,
            "test_acc": test_acc,
            "test_acc_top5": test_acc_top5,
            "test_loss": test_loss,
        }
        self.log(lr, epoch, log_dict)
        save_checkpoint({"model": self.distiller.module.state_dict()}, self.log_path / "mine")


trainer_dict["old"] = OldTrainer
trainer_dict["older"] = OlderTrainer
"""


def test_a_trainer_of_the_original_gives_the_same_run(tmp_path):
    """One overrides an iteration, the other the whole epoch."""
    (tmp_path / "old.py").write_text(OLD_TRAINER)
    for name in ("base", "old", "older"):
        (tmp_path / name).mkdir()
    ours = metrics(train(tmp_path / "base"))
    for name in ("old", "older"):
        text = f"SOLVER:\n  TRAINER: {name}\n"
        old = metrics(train(tmp_path / name, "--import", tmp_path / "old.py", text=text))
        for mine, theirs in zip(ours, old, strict=True):
            for key in ("train_loss", "train_acc", "test_acc"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6), name
