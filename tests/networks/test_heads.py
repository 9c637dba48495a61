"""Runs of methods whose student has another head: training, resume, what its files are worth."""

import json

import pytest
import torch
from support import command, same_state, saved_teacher, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command


def settings(folder, method, teacher="resnet14", **more):
    path = str(saved_teacher(folder, teacher))
    return {"method": method, "TEACHER": teacher, "TEACHER_CKPT": path, **more}


def run_of(folder, *words, **options):
    config = write_config(folder, **options)
    assert train_command.main(["--cfg", str(config), *words]) == 0
    return folder / "out" / "toy" / "run"


def summary(run):
    return json.loads((run / "summary.json").read_text())


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["SIMKD", pytest.param("CATKD", marks=pytest.mark.slow)])
def test_eval_gives_accuracy_and_loss_that_training_printed(tmp_path, capsys, method):
    run = run_of(tmp_path, epochs=2, **settings(tmp_path, method))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({row["test_loss"] for row in rows}) == 2
    best = rows[summary(run)["best_epoch"] - 1]
    for name, row in (
        ("best", best),
        ("student_best", best),
        ("latest", rows[-1]),
        ("student_latest", rows[-1]),
    ):
        words = ["-m", "resnet8", "-c", str(run / name), "--cfg", str(tmp_path / "toy.yaml")]
        assert eval_command.main(words) == 0
        out = capsys.readouterr().out
        assert f"top-1 {row['test_acc']:.2f}  top-5 {row['test_acc_top5']:.2f}" in out
        assert f"loss {row['test_loss']:.4f}" in out


def test_a_student_with_the_teachers_head_can_be_a_teacher(tmp_path, capsys):
    run = run_of(tmp_path, epochs=1, **settings(tmp_path, "SIMKD"))
    (tmp_path / "next").mkdir()
    chained = settings(tmp_path, "KD") | {
        "TEACHER": "resnet8",
        "TEACHER_CKPT": str(run / "student_latest"),
    }
    second = run_of(tmp_path / "next", epochs=1, **chained)
    assert summary(second)["teacher_acc"] == summary(run)["last_acc"]


@pytest.mark.parametrize("method", ["SIMKD", pytest.param("CATKD", marks=pytest.mark.slow)])
def test_resume_is_exact_to_the_bit(tmp_path, method):
    options = settings(tmp_path, method, text="SOLVER:\n  LR: 0.01\n")
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    whole = run_of(tmp_path / "whole", epochs=2, **options)
    halves = run_of(tmp_path / "halves", epochs=1, **options)
    assert run_of(tmp_path / "halves", "--resume", epochs=2, **options) == halves
    first, second = load(whole / "latest"), load(halves / "latest")
    assert first["epoch"] == second["epoch"] == 2
    assert same_state(first["model"], second["model"])


def test_two_processes_train_a_neck(tmp_path):
    """DistributedDataParallel ends with an error at the second step if a parameter is unused."""
    config = write_config(tmp_path, epochs=1, **settings(tmp_path, "SIMKD"))
    done = command("--cfg", config, "SOLVER.BATCH_SIZE", 16, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "toy").glob("run*/student_latest"))) == 1
