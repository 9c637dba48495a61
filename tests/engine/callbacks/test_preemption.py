"""Signals, saves within an epoch, and going on from them; here in one process, to the bit."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from support import REPO, same_state, saved_teacher, write_config
from test_training import load, untimed

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks import preemption
from mdistiller.engine.callbacks.default import Checkpoint
from mdistiller.engine.callbacks.non_finite import NonFiniteGuard
from mdistiller.engine.metrics import NonFiniteLossError
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import UserError


def main(config, *words):
    return train_command.main(["--cfg", str(config), *map(str, words)])


def teacher_first(folder):
    own = folder / "teacher"
    own.mkdir()
    path = write_config(own, epochs=2, student="BabyStudent")
    path.write_text(path.read_text() + "EXPERIMENT: {NAME: teacher}\n")
    return {"method": "KD", "TEACHER": "BabyStudent", "TEACHER_CFG": str(path)}


def given(folder, method="KD", model="BabyStudent"):
    path = saved_teacher(folder, model)
    return {"method": method, "TEACHER": model, "TEACHER_CKPT": str(path)}


CASES = {
    "accumulation": (given, "SOLVER: {ACCUMULATE: 2, BATCH_SIZE: 20, EMA: 0.9}\n", "", 2, 4),
    "dot, last step": (given, "SOLVER: {TRAINER: dot}\nDATASET: {MIXUP: 0.2}\n", "", 2, 5),
    "logits on disk": (
        lambda folder: {**given(folder), "TEACHER_CACHE": "disk"},
        "DATASET: {AUGMENT: none}\n",
        "",
        1,
        3,
    ),
    "the teacher's training": (teacher_first, "", "", 1, 3),
    "a stage before": (
        lambda folder: given(folder, "FSP", "resnet8"),
        "FSP: {INIT: {EPOCHS: 2, LR: 0.02}}\n",
        "init",
        2,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_signal_ends_a_run_that_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys, case):
    make, text, *where = CASES[case]
    paths = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        settings = make(tmp_path / name)
        student = "resnet8" if where[0] else "BabyStudent"
        paths.append(write_config(tmp_path / name, text, student=student, **settings))
    whole, stopped = paths
    assert main(whole, "LOG.TENSORBOARD_FREQ", 2, "EXPERIMENT.NAME", "run") == 0

    original = BaseTrainer.train_iter

    def train_iter(self, data, epoch, meters):
        if [self.stage, epoch, self.step] == where:
            monkeypatch.setattr(BaseTrainer, "train_iter", original)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, data, epoch, meters)

    monkeypatch.setattr(BaseTrainer, "train_iter", train_iter)
    words = ["--cfg", str(stopped), "LOG.TENSORBOARD_FREQ", "2", "EXPERIMENT.NAME", "run"]
    monkeypatch.setattr(sys, "argv", ["tools/train.py", *words])
    assert train_command.main(words) == preemption.EXIT_CODE == 75
    said = capsys.readouterr().err
    assert "stopped by SIGTERM" in said
    python, script, *words = shlex.split(said.partition("; continue with\n")[2])
    assert (python, script) == ("python", "tools/train.py")
    assert train_command.main(words) == 0
    assert ", within epoch" in capsys.readouterr().out or where[0]
    runs = [path.parent / "out" / "toy" / "run" for path in paths]
    first, second = (load(run / "latest") for run in runs)
    assert same_state(first["model"], second["model"])
    assert untimed(runs[0]) == untimed(runs[1])
    texts = [(run / "worklog.txt").read_text() for run in runs]
    assert texts[0] == texts[1]


STARTS = {
    "/bin/mdistiller train --cfg a": "mdistiller train --cfg a --resume auto",
    "/lib/mdistiller/__main__.py sweep --cfg a": "python -m mdistiller sweep --cfg a",
    "tools/train.py --resume run": "python tools/train.py --resume run",
    "mine.py": "resume='auto'",
    "4 4 tools/train.py": "torchrun --nproc-per-node 4 tools/train.py --resume auto",
    "8 4 tools/train.py": "torchrun --nnodes 2 --nproc-per-node 4 tools/train.py --resume auto",
}


@pytest.mark.parametrize("start", STARTS)
def test_the_command_to_go_on_is_whole(monkeypatch, start):
    words = start.split()
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, words.pop(0) if start[0].isdigit() else "1")
    monkeypatch.setattr(sys, "argv", words)
    assert preemption.same_command() == STARTS[start]


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    asked = preemption._Asked()
    with pytest.raises(preemption.Preempted, match="before the first step"):
        asked.note(signal.SIGTERM, None)
    asked = preemption._Asked()
    asked.begun = True
    with pytest.raises(preemption.Preempted, match="no step is taken, all is saved"):
        asked.note(signal.SIGTERM, None)
    asked = preemption._Asked()
    asked.shields = 1
    asked.note(signal.SIGTERM, None)
    assert codes == []
    asked.note(signal.SIGINT, None)
    assert codes == [130]
    monkeypatch.setenv("LOCAL_RANK", "0")  # a launcher hands on what the process got already
    asked.at = time.monotonic()
    asked.note(signal.SIGTERM, None)
    assert codes == [130]


def test_signals_are_what_they_were_afterwards(tmp_path):
    before = [signal.getsignal(getattr(signal, name)) for name in preemption.SIGNALS]
    assert main(write_config(tmp_path, epochs=1, student="BabyStudent")) == 0
    assert before == [signal.getsignal(getattr(signal, name)) for name in preemption.SIGNALS]


def test_a_save_within_an_epoch_that_fails_is_told_and_training_goes_on(
    tmp_path, monkeypatch, capsys
):
    saves = []

    def save(self, trainer):
        saves.append(trainer.step)
        raise UserError("cannot write latest: No space left on device")

    monkeypatch.setattr(Checkpoint, "save", save)
    text = "LOG: {SAVE_EVERY_MINUTES: 1.0e-9}\n"
    assert main(write_config(tmp_path, text, epochs=1, student="BabyStudent")) == 0
    assert saves == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("No space left on device; training goes on") == 5


def test_weights_that_are_none_end_a_run_that_would_save_them(tmp_path, monkeypatch, capsys):
    def spoilt(self, trainer):
        raise NonFiniteLossError("weights are not finite after epoch 0, step 1")

    monkeypatch.setattr(NonFiniteGuard, "before_save", spoilt)
    text = "LOG: {SAVE_EVERY_MINUTES: 1.0e-9}\n"
    assert main(write_config(tmp_path, text, epochs=1, student="BabyStudent")) == 2
    said = capsys.readouterr()
    assert "weights are not finite after epoch 0, step 1" in said.err
    assert "training goes on" not in said.out


def test_resume_auto_starts_continues_and_refuses(tmp_path, capsys):
    settings = {"epochs": 1, "student": "BabyStudent"}
    path = write_config(tmp_path, **settings)
    assert main(path, "--resume", "auto") == 0
    assert main(path, "--resume", "auto") == 0
    assert "continuing from" in capsys.readouterr().out
    path = write_config(tmp_path, "SOLVER: {LR: 0.2}\nLOG: {TENSORBOARD_FREQ: 7}\n", **settings)
    assert main(path, "--resume", "auto") == 2
    error = capsys.readouterr().err
    assert "SOLVER.LR was 0.05, is now 0.2" in error
    assert "TENSORBOARD_FREQ" not in error
    assert main(path, "--resume", "--allow-changes") == 0
    out = capsys.readouterr().out
    assert "SOLVER.LR was 0.05, is now 0.2; LOG.TENSORBOARD_FREQ was 500, is now 7" in out


def test_allowed_changes_hold_from_then_on_and_are_recorded(tmp_path, capsys):
    settings = {"student": "BabyStudent"}
    assert main(write_config(tmp_path, epochs=1, **settings)) == 0
    run = tmp_path / "out" / "toy" / "run"
    solver = "LR: 0.2, WEIGHT_DECAY: 0.01, MOMENTUM: 0.5, LR_DECAY_STAGES: [2]"
    path = write_config(tmp_path, f"SOLVER: {{{solver}}}\n", epochs=3, **settings)
    assert main(path, "--resume", "--allow-changes") == 0
    assert [row["lr"] for row in untimed(run)] == pytest.approx([0.05, 0.2, 0.02])
    (group,) = load(run / "latest")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    changes = json.loads((run / "run.json").read_text())["starts"][-1]["changes"]
    assert "SOLVER.WEIGHT_DECAY was 0.0005, is now 0.01" in changes

    adam = "LR: 0.001, WEIGHT_DECAY: 0.01, TYPE: AdamW, LR_DECAY_STAGES: [2], MOMENTUM: 0.5"
    path = write_config(tmp_path, f"SOLVER: {{{adam}}}\n", epochs=4, **settings)
    assert main(path, "--resume", "--allow-changes") == 0
    assert "another optimizer: it starts without state" in capsys.readouterr().out
    assert "exp_avg" in load(run / "latest")["optimizer"]["state"][0]
    assert main(path, "--resume", "--allow-changes", "EXPERIMENT.NAME", "run", *SEED) == 2
    assert "cannot be changed any more (EXPERIMENT.SEED was 0" in capsys.readouterr().err


SEED = ("EXPERIMENT.SEED", 3)


def test_a_run_with_workers_ends_by_itself(tmp_path):
    """When SIGTERM reaches its first process alone."""
    text = "DATASET: {LOADER: workers, NUM_WORKERS: 1}\nLOG: {SAVE_EVERY_MINUTES: 1.0e-9}\n"
    config = write_config(tmp_path, text, student="BabyStudent", epochs=10**4)
    words = [sys.executable, str(REPO / "tools" / "train.py"), "--cfg", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    try:
        latest = tmp_path / "out" / "toy" / "run" / "latest"
        until = time.monotonic() + 90
        while not latest.exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 75
    finally:
        process.kill()
