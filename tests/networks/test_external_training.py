"""Runs with networks of timm: their arguments, resume, evaluation."""

import pytest
from support import same_state, saved_teacher, write_config
from test_training import load, train, untimed

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command

VIT = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2}
SOLVER = "SOLVER:\n  TYPE: AdamW\n  LR: 0.002\n"


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_ofa_trains_a_vit_and_resumes_to_the_bit(tmp_path, capsys):
    settings = {
        "method": "OFA",
        "student": "timm/vit_tiny_patch16_224",
        "STUDENT_ARGS": VIT,
        "TEACHER": "resnet8",
        "TEACHER_CKPT": str(saved_teacher(tmp_path)),
        "text": SOLVER,
    }
    whole = train(folder(tmp_path, "whole"), epochs=2, **settings)
    half = train(folder(tmp_path, "half"), epochs=1, **settings)
    words = ["--cfg", str(tmp_path / "half" / "toy.yaml"), "SOLVER.EPOCHS", "2"]
    assert train_command.main([*words, "EXPERIMENT.NAME", "run", "--resume"]) == 0
    states = [load(run / "latest")["model"] for run in (whole, half)]
    assert same_state(*states)
    assert "student.blocks.3.norm1.weight" in states[0]
    assert any(key.startswith("branches.3.blocks.0.") for key in states[0])
    rows = untimed(whole)
    assert rows == untimed(half)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]

    capsys.readouterr()
    words = ["-m", settings["student"], "-c", str(whole / "student_latest")]
    assert eval_command.main([*words, "--cfg", str(whole / "config.yaml")]) == 0
    assert f"top-1 {rows[1]['test_acc']:.2f}" in capsys.readouterr().out


def test_a_vit_teaches_from_the_config_that_trains_it_with_its_arguments(tmp_path, capsys):
    teacher = write_config(
        folder(tmp_path, "t"),
        epochs=1,
        student="timm/vit_tiny_patch16_224",
        STUDENT_ARGS=VIT,
        text=f"EXPERIMENT:\n  NAME: teacher\n{SOLVER}",
    )
    settings = {
        "method": "OFA",
        "TEACHER": "timm/vit_tiny_patch16_224",
        "TEACHER_CFG": str(teacher),
        "epochs": 1,
    }
    path = write_config(tmp_path, **settings)
    assert train_command.main(["--cfg", str(path)]) == 2
    message = "TEACHER_CFG trains a timm/vit_tiny_patch16_224 with STUDENT_ARGS {'patch_size': 8"
    assert message in capsys.readouterr().err
    run = train(tmp_path, TEACHER_ARGS=VIT, **settings)
    assert "teacher.blocks.3.norm1.weight" in load(run / "latest")["model"]


def test_resume_notices_arguments_that_were_added_or_left_out(tmp_path, capsys):
    name = "timm/vit_tiny_patch16_224"
    train(tmp_path, epochs=1, student=name, STUDENT_ARGS=VIT, text=SOLVER)
    fewer = {key: value for key, value in VIT.items() if key != "num_heads"}
    for settings in (fewer, {**VIT, "drop_rate": 0.1}, {**VIT, "depth": 3}):
        path = write_config(tmp_path, epochs=2, student=name, STUDENT_ARGS=settings, text=SOLVER)
        assert train_command.main(["--cfg", str(path), "--resume"]) == 2
        error = capsys.readouterr().err
        assert f"DISTILLER.STUDENT_ARGS was {VIT}, is now {settings}" in error


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        ("resnet8", {"patch_size": 4}, "DISTILLER.STUDENT_ARGS {'patch_size': 4}: "),
        ("timm/vit_tiny_patch16_224", {"patches": 4}, "cannot be built with patches=4"),
        ("timm/vit_tiny_patch61_224", {}, "DISTILLER.STUDENT: timm has no network"),
    ],
)
def test_wrong_arguments_and_names_end_in_a_line(tmp_path, capsys, student, settings, message):
    path = write_config(tmp_path, student=student, STUDENT_ARGS=settings)
    assert train_command.main(["--cfg", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
