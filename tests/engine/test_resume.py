"""Runs that are continued: to the bit, and under which other settings."""

import signal
import sys

import numpy as np
import pytest
import torch
from support import command, same_state, saved_teacher, write_config
from test_training import load, metrics, train, untimed

from mdistiller.cli import train as train_command
from mdistiller.engine.cfg import load_config
from mdistiller.run_folder.changes import changed_settings, differences

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


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (
            [
                *("DATASET.SHARDS.TARGET", "", "DATASET.EXIF", False, "DATASET.VAL_SEED", 3),
                *("LSKD.EPS", 0.1, "SOLVER.DOT.DELTA", 0.2, "SOLVER.DEEPKD.TOPK", 5),
                *("DISTILLER.TEACHER", "resnet8", "DISTILLER.CE_WEIGHT", 0.5),
            ],
            False,
        ),
        (["DATASET.TYPE", "webdataset", "DATASET.SHARDS.TARGET", ""], True),
        (["DATASET.TYPE", "webdataset", "DATASET.EXIF", False], True),
        (["DATASET.TYPE", "imagefolder", "DATASET.EXIF", False], True),
        (["DATASET.VAL_SPLIT", 9, "DATASET.VAL_SEED", 3], True),
        (["LSKD.ENABLE", True, "LSKD.EPS", 0.1], True),
        (["SOLVER.TRAINER", "dot", "SOLVER.DOT.DELTA", 0.2], True),
        (["SOLVER.TRAINER", "deepkd", "SOLVER.DEEPKD.TOPK", 5], True),
        (["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet8"], True),
        (["DISTILLER.TYPE", "KD+AT", "DISTILLER.CE_WEIGHT", 0.5], True),
    ],
)
def test_a_key_that_the_run_does_not_read_is_no_change(words, changed):
    """The last pair is what has changed since the run was recorded."""
    before, now = (
        load_config("", ["DATASET.TYPE", "digits", *some])
        for some in (words[:-2] if changed else [], words)
    )
    changes = differences(before, now)
    assert len(changes) == changed
    assert all(text.startswith(f"{words[-2]} was") for text in changes)


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
