"""SOLVER.COMPILE: what is compiled, what stays as it is, and what happens where it fails."""

import pytest
import torch
from support import same_state, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.distillers import Vanilla
from mdistiller.models import get_model_entry
from mdistiller.networks import compiling

RAN = []


def counting(graph, inputs):
    RAN.append(len(inputs))
    return graph.forward


def failing(graph, inputs):
    raise RuntimeError("no C++ compiler here\nand more lines")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    RAN.clear()


def network():
    torch.manual_seed(0)
    return get_model_entry("resnet8", "cifar")(num_classes=10)


def train(folder, compiled):
    folder.mkdir()
    config = write_config(
        folder,
        method="KD",
        student="resnet8",
        epochs=1,
        TEACHER="resnet8",
        TEACHER_CKPT=str(saved_teacher(folder)),
        text=f"SOLVER:\n  COMPILE: {compiled}\n  BATCH_SIZE: 40\n  EMA: 0.5\n",
    )
    assert train_command.main(["--cfg", str(config)]) == 0
    run = folder / "out" / "toy" / "run"
    names = ("latest", "student_latest", "student_ema_latest")
    return [torch.load(run / name, weights_only=True)["model"] for name in names]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights of the run without COMPILE."""
    torch.set_num_threads(1)
    weights = train(tmp_path_factory.mktemp("plain") / "run", False)
    assert not RAN
    return weights


def test_a_run_is_the_same_and_its_files_have_the_same_names(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", counting)
    compiled = train(tmp_path / "compiled", True)
    assert len(RAN) >= 2  # student and teacher
    assert all(map(same_state, plain, compiled))


def test_a_failure_is_one_line_and_training_goes_on(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "BACKEND", failing)
    capsys.readouterr()
    failed = train(tmp_path / "failed", True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "COMPILE" in line]
    told = [line for line in lines if "SOLVER.COMPILE" in line]
    assert told == [
        f"[INFO] SOLVER.COMPILE: the {role} runs uncompiled: RuntimeError: no C++ compiler here"
        for role in ("student", "teacher")
    ]
    assert all(map(same_state, plain, failed))


def test_a_compiler_that_is_not_there_at_all(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("Python 3.99 is not supported")

    net = network()
    monkeypatch.setattr(net, "compile", refuse)
    compiling.compile_networks(Vanilla(net), "default")
    assert "the student runs uncompiled: RuntimeError: Python 3.99" in capsys.readouterr().out
    assert net(torch.zeros(2, 3, 32, 32))[0].shape == (2, 10)


def test_an_error_of_the_network_itself_stays_one(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    net = network()
    compiling.compile_networks(Vanilla(net), True)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        net(torch.zeros(2, 5, 32, 32))
