"""Two gloo processes on this machine; test_failure.py starts such by torchrun."""

import json

import pytest
import torch
from support import command, same_state, saved_teacher, write_config

RECORDER = """
import json
import os
from mdistiller.distillers import DISTILLERS
from mdistiller.distillers.KD import KD

@DISTILLERS.register("Recorder")
class Recorder(KD):
    def distill(self, student, teacher, target, *, epoch, index, **batch):
        with open(os.path.join(os.environ["SEEN"], os.environ.get("RANK", "0")), "a") as log:
            log.write(json.dumps([epoch, index.tolist()]) + "\\n")
        return super().distill(student, teacher, target)
"""


def seen(folder):
    """Sample numbers by epoch and process, in order."""
    epochs = {}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            epoch, index = json.loads(line)
            epochs.setdefault(epoch, {}).setdefault(path.name, []).extend(index)
    return epochs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with batches of 48, and two of 24, on 153 images: the last batch splits 5 / 4.

    The student has no batch norm: its statistics would be each process's own.
    """
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "recorder.py").write_text(RECORDER)
    teacher = str(saved_teacher(folder))
    for name, batch, processes in (("one", 48, 0), ("two", 24, 2)):
        (folder / name / "seen").mkdir(parents=True)
        config = write_config(
            folder / name,
            method="Recorder",
            student="BabyStudent",
            epochs=3,
            TEACHER="resnet8",
            TEACHER_CKPT=teacher,
            text=f"SOLVER:\n  BATCH_SIZE: {batch}\n  LR: 0.02\nDATASET:\n  VAL_SPLIT: 7\n",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SEEN", str(folder / name / "seen"))
            words = ["--import", folder / "recorder.py"]
            done = command("--cfg", config, *words, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


def rows(folder, name):
    path = folder / name / "out" / "toy" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_follow_one_with_the_doubled_batch(runs):
    for one, two in zip(rows(runs, "one"), rows(runs, "two"), strict=True):
        for key in ("train_loss", "train_loss_kd", "test_loss", "train_acc", "test_acc"):
            assert two[key] == pytest.approx(one[key], rel=2e-5), key
    states = [
        torch.load(runs / name / "out" / "toy" / "run" / "student_latest", weights_only=True)
        for name in ("one", "two")
    ]
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], value, rtol=1e-4, atol=1e-6)


def test_each_sample_is_seen_once_an_epoch_in_another_order(runs):
    epochs = seen(runs / "two" / "seen")
    assert set(epochs) == {1, 2, 3}
    for by_rank in epochs.values():
        assert set(by_rank) == {"0", "1"}
        assert sorted(by_rank["0"] + by_rank["1"]) == list(range(153))
    assert epochs[1]["0"] != epochs[2]["0"]
    assert set(epochs[1]["0"]) != set(epochs[2]["0"])  # the processes' shares differ as well


def test_one_process_writes(runs):
    record = json.loads((runs / "two" / "out" / "toy" / "run" / "run.json").read_text())
    assert len(record["starts"]) == 1
    assert record["starts"][0]["processes"] == 2


BUFFERS = """
import os
import torch
from mdistiller.engine.hooks import Hook
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

class Keep(Hook):
    def after_epoch(self, trainer, epoch, record):
        path = os.path.join(os.environ["SEEN"], "rank" + os.environ["RANK"])
        torch.save({"state": trainer.model.state_dict(), "acc": record["test_acc"]}, path)

@trainer_dict.register("keeps")
class Keeps(BaseTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hooks.append(Keep())
"""


def test_all_processes_evaluate_the_network_that_is_saved(tmp_path, monkeypatch):
    """With batch norm each process has statistics of its own until they are made to agree."""
    (tmp_path / "keep.py").write_text(BUFFERS)
    monkeypatch.setenv("SEEN", str(tmp_path))
    config = write_config(tmp_path, epochs=1, text="SOLVER:\n  TRAINER: keeps\n")
    done = command("--cfg", config, "--import", tmp_path / "keep.py", processes=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert first["acc"] == second["acc"]
    assert same_state(first["state"], second["state"])
