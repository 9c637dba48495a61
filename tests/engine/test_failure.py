"""One of two processes fails, or both for one reason: all end, and the cause is told once."""

import time

import pytest
from support import command, torchrun, write_config

FAILS = """
import os
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

@trainer_dict.register("fails")
class Fails(BaseTrainer):
    def batch_inputs(self, data, epoch):
        inputs = super().batch_inputs(data, epoch)
        if self.step == 2 and os.environ["RANK"] == "1":
            inputs["image"] = inputs["image"] * float("nan")
        return inputs
"""


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["SOLVER.TRAINER", "fails"], "error (rank 1): non-finite loss in epoch 1, step 2"),
        (["DATASET.TYPE", "nothing"], "error: unknown data set 'nothing'"),
    ],
)
def test_the_cause_is_told_once(tmp_path, words, cause):
    (tmp_path / "fails.py").write_text(FAILS)
    config = write_config(tmp_path, student="BabyStudent", epochs=1)
    started = time.monotonic()
    prefix = torchrun(2)
    done = command("--cfg", config, "--import", tmp_path / "fails.py", *words, prefix=prefix)
    assert time.monotonic() - started < 120  # the other one would wait for half an hour
    assert done.returncode != 0
    assert done.stderr.count(cause) == 1, done.stderr
    ours = done.stderr[: done.stderr.index("torch/distributed/elastic")]  # then torchrun's report
    assert ours.count("error") == 1, ours
    assert "Traceback" not in ours
