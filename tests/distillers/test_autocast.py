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


@pytest.mark.parametrize(
    "words", ["DGKD", "CTKD CTKD.MODE instance CTKD.BASE dkd LSKD.ENABLE True"]
)
def test_one_command_trains_an_epoch(tmp_path, words):
    method, *overrides = words.split()
    config = write_config(
        tmp_path,
        method=method,
        student="BabyStudent",
        epochs=1,
        TEACHER="BabyTeacher",
        TEACHER_CKPT=str(saved_teacher(tmp_path, "BabyTeacher")),
    )
    words = [*overrides, "SOLVER.LR", "0.001", "EXPERIMENT.NAME", "run"]
    assert train_command.main(["--cfg", str(config), *words]) == 0
    state = torch.load(tmp_path / "out" / "toy" / "run" / "latest", weights_only=True)
    assert state["epoch"] == 1
    assert 0 < abs(state["history"][0]["train_loss_kd"]) < 1e4  # DGKD's may be negative
