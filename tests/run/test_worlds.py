"""Runs in 1, 2 and 4 gloo processes, with accumulation and clipping: the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from support import run_script, saved_teacher
from world_processes import CASES, MANY

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    saved_teacher(folder)
    done = run_script(Path(__file__).with_name("world_processes.py"), folder, *WORLDS)
    assert done.returncode == 0, done.stderr
    return folder


def result(folder, world, case):
    run = folder / str(world) / case / "out" / "toy" / "run"
    record = json.loads((run / "metrics.jsonl").read_text())
    files = [*(path.name for path in run.glob("student_*_latest")), "student_latest"]
    states = {name: torch.load(run / name, weights_only=True)["model"] for name in files}
    return record, states


@pytest.mark.parametrize(
    ("world", "case"), [(2, case) for case in CASES] + [(4, case) for case in MANY]
)
def test_losses_and_weights_are_those_of_one_process(folder, world, case):
    (one, states), (many, others) = (result(folder, w, case) for w in (1, world))
    losses = [key for key in one if key.startswith(("train_loss", "ema_"))]
    assert len(losses) > 2
    for key in [*losses, "test_loss", "test_acc"]:
        assert many[key] == pytest.approx(one[key], rel=5e-5), key
    assert states.keys() == others.keys()
    assert ("student_ema_latest" in states) == (case == "KD")
    if case == "PSKD":
        runs = [folder / str(w) / case / "out" / "toy" / "run" / "latest" for w in (1, world)]
        past, shared = (torch.load(run, weights_only=True)["model"]["predictions"] for run in runs)
        assert (past.sum(dim=1) > 0).all()
        torch.testing.assert_close(shared, past, rtol=1e-4, atol=1e-6)
    atol = 2e-4 if case == "SYNC_BN" else 2e-6  # batch norm and ReLU blow up rounding
    for name, state in states.items():
        for key, value in state.items():
            torch.testing.assert_close(others[name][key], value, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(folder, world):
    """Outputs, gradients, running statistics, in every process; the reference is torch's."""
    one = torch.load(folder / "1" / "normalized0")
    for rank in range(world):
        many = torch.load(folder / str(world) / f"normalized{rank}")
        for value, want in zip(many, one, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_each_sample_counts_once(folder, world):
    """In training on 54 images, and in validation on 10, which 4 processes share unevenly."""
    seen = json.loads((folder / str(world) / "seen.json").read_text())
    assert sorted(seen["SYNC_BN"]) == list(range(54))
    assert seen["validated"] == pytest.approx(seen["held out"])
    assert len(set(seen["validated"])) == 10
