"""One of two processes fails, or both for one reason: all end, and the cause is printed once."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed.run
from support import REPO, command, run_script, write_config

from mdistiller.cli.support.command import guarded
from mdistiller.distributed import failure

FAILS = """
import os, signal
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

@trainer_dict.register("fails")
class Fails(BaseTrainer):
    def batch_inputs(self, data, epoch):
        inputs = super().batch_inputs(data, epoch)
        if self.step == 2 and os.environ["RANK"] == "1":
            inputs["image"] = inputs["image"] * float("nan")
        return inputs

@trainer_dict.register("dies")
class Dies(BaseTrainer):
    def batch_inputs(self, data, epoch):
        if self.step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch_inputs(data, epoch)
"""


@pytest.mark.parametrize(
    ("words", "cause", "start"),
    [
        (
            ["SOLVER.TRAINER", "fails"],
            "error (rank 1): non-finite loss in epoch 1, step 2",
            {"processes": 2},
        ),
        (["DATASET.TYPE", "nothing"], "error: unknown data set 'nothing'", {"processes": 2}),
    ],
)
def test_the_cause_is_told_once(tmp_path, words, cause, start):
    (tmp_path / "fails.py").write_text(FAILS)
    config = write_config(tmp_path, student="BabyStudent", epochs=1)
    started = time.monotonic()
    done = command("--cfg", config, "--import", tmp_path / "fails.py", *words, **start)
    assert time.monotonic() - started < 120  # the other one would wait for half an hour
    assert done.returncode != 0
    assert done.stderr.count(cause) == 1, done.stderr
    ours = done.stderr.partition("torch/distributed/elastic")[0]  # then torchrun's report
    assert ours.count("error") == 1, ours
    assert "Traceback" not in ours


def test_no_cause_is_made_up_for_a_process_that_was_killed(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    config = write_config(tmp_path, student="BabyStudent", epochs=1)
    words = ["--standalone", "--nproc-per-node=2", REPO / "tools" / "train.py", "--cfg", config]
    words += ["--import", tmp_path / "fails.py", "SOLVER.TRAINER", "dies"]
    done = run_script(torch.distributed.run.__file__, *words)
    assert done.returncode != 0
    ours, _, torchruns = done.stderr.rpartition("Traceback")
    assert "warm_start.py" in torchruns  # which forked it
    assert "Traceback" not in ours
    assert ours.count("error") == ours.count("error: another process ended without a word")
    assert "Signal 9" in done.stderr


def test_a_process_that_keeps_the_store_and_hangs_keeps_none_from_telling(monkeypatch):
    """It takes connections, as the system does for one that is stopped, and says nothing."""
    answers = []
    with socket.create_server(("localhost", 0)) as silent:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        monkeypatch.setattr(failure, "ANSWER", 0.3)
        failure._claim.cache_clear()
        asks = threading.Thread(target=lambda: answers.append(failure.first_to_fail()), daemon=True)
        asks.start()
        asks.join(20)
    failure._claim.cache_clear()
    assert answers == [True]


def test_a_failure_counts_for_all_once_all_have_met_it(monkeypatch):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(failure, "SAME_FAILURE", 0.3)
    with ThreadPoolExecutor(2) as processes:
        for runs, answers in ((["a", "a"], [True, True]), (["b", "c"], [False, False])):
            assert list(processes.map(failure.fails_everywhere, runs)) == answers


@pytest.mark.parametrize(
    "said",
    [
        "Timed out waiting 6000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
    ],
)
def test_a_process_that_does_not_come_is_told_in_a_line(said, monkeypatch, capsys):
    def waits():
        raise RuntimeError(said)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(failure, "first_to_fail", lambda: True)
    monkeypatch.setattr(failure, "leave", lambda told: None)
    assert guarded(waits) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("within SOLVER.RANK_TIMEOUT: it hangs or is stopped")
