"""The modern logit methods under autocast, and through the whole command."""

import pytest
import torch
from support import saved_teacher, write_config
from test_distillers import batch, networks

from mdistiller.cli import train as train_command
from mdistiller.distillers import get_distiller
from mdistiller.engine.cfg import default_config


def test_under_autocast_the_loss_is_that_of_the_networks_outputs_in_float32():
    """The terms are near those of a float32 step."""
    for name in ("DIST", "CTKD", "NKD", "USKD", "TTM", "WTTM", "DGKD"):
        values = []
        for enabled in (True, False):
            distiller = get_distiller(name).build(*networks(), default_config(), 50, (32, 32))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
                _, losses = distiller.train()(**batch())
            values.append(sum(losses.values()).item())
        assert values[0] == pytest.approx(values[1], rel=0.05), name


def test_one_command_trains_an_epoch_at_temperatures_of_single_samples(tmp_path):
    config = write_config(
        tmp_path,
        method="CTKD",
        student="BabyStudent",
        epochs=1,
        TEACHER="BabyTeacher",
        TEACHER_CKPT=str(saved_teacher(tmp_path, "BabyTeacher")),
    )
    words = "CTKD.MODE instance CTKD.BASE dkd LSKD.ENABLE True SOLVER.LR 0.001 EXPERIMENT.NAME run"
    assert train_command.main(["--cfg", str(config), *words.split()]) == 0
    state = torch.load(tmp_path / "out" / "toy" / "run" / "latest", weights_only=True)
    assert state["epoch"] == 1
    assert 0 < state["history"][0]["train_loss_kd"] < 1e4
