"""Two gloo processes on this machine; test_failure.py starts such by torchrun, and test_worlds.py
compares their numbers with those of one.
"""

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
def run(tmp_path_factory):
    """The folder of a run of two, in batches of 24, on 153 images: the last batch splits 5 / 4."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "recorder.py").write_text(RECORDER)
    (folder / "seen").mkdir()
    config = write_config(
        folder,
        method="Recorder",
        student="BabyStudent",
        TEACHER="resnet8",
        TEACHER_CKPT=str(saved_teacher(folder)),
        text="SOLVER:\n  BATCH_SIZE: 24\n  LR: 0.02\nDATASET:\n  VAL_SPLIT: 7\n",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEN", str(folder / "seen"))
        done = command("--cfg", config, "--import", folder / "recorder.py", processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def test_each_sample_is_seen_once_an_epoch_in_another_order(run):
    epochs = seen(run / "seen")
    assert set(epochs) == {1, 2}
    for by_rank in epochs.values():
        assert set(by_rank) == {"0", "1"}
        assert sorted(by_rank["0"] + by_rank["1"]) == list(range(153))
    assert epochs[1]["0"] != epochs[2]["0"]
    assert set(epochs[1]["0"]) != set(epochs[2]["0"])  # the processes' shares differ as well


def test_one_process_writes(run):
    record = json.loads((run / "out" / "toy" / "run" / "run.json").read_text())
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
