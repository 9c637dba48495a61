"""SOLVER.CUDA_GRAPHS as far as it runs on CPUs: a stand-in calls a recorded step again."""

import json

import pytest
import torch
from support import same_state, saved_teacher, write_config

from benchmarks.gpu.stand_in import CalledAgain
from mdistiller.distillers.KD import KD
from mdistiller.engine import captured
from mdistiller.engine.cfg import load_config
from mdistiller.engine.hooks import Hook
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import UserError
from mdistiller.run.train import train, train_together


@pytest.fixture
def stand_in(monkeypatch):
    """The class in place of CUDA graphs, which counts its replays."""

    class Counted(CalledAgain):
        replays = 0

        def replay(self):
            Counted.replays += 1
            super().replay()

    monkeypatch.setattr(captured, "CudaGraph", Counted)
    return Counted


def config(folder, method="KD", words=()):
    folder.mkdir(parents=True, exist_ok=True)
    weights = str(saved_teacher(folder, "resnet8"))
    path = write_config(folder, method=method, TEACHER="resnet8", TEACHER_CKPT=weights)
    # 129 images: five batches of 24 and one of nine
    common = ["SOLVER.CUDA_GRAPHS", True, "DATASET.VAL_SPLIT", 31, "SOLVER.BATCH_SIZE", 24]
    return load_config(path, [*common, *words])


def left_by(folder):
    state = torch.load(folder / "out" / "toy" / "run" / "latest", weights_only=True)
    lines = (folder / "out" / "toy" / "run" / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "images_per_second", "time")
    rows = [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
    return state, rows


@pytest.mark.parametrize(("method", "words"), [("DKD", ["DKD.WARMUP", 2]), ("MLKD", [])])
def test_replayed_steps_are_the_usual_ones(tmp_path, stand_in, method, words):
    """The rate and DKD's weight change with the epoch; MLKD's batches are pairs of views."""
    first, second = tmp_path / "usual", tmp_path / "recorded"
    train(config(first, method, [*words, "SOLVER.CUDA_GRAPHS", False]))
    assert stand_in.replays == 0
    train(config(second, method, words))
    assert stand_in.replays == 2 * (5 - captured.WARM_UP)
    (state, rows), (other, other_rows) = left_by(first), left_by(second)
    assert rows == other_rows
    assert same_state(state["model"], other["model"])
    for key, momenta in state["optimizer"]["state"].items():
        assert same_state(momenta, other["optimizer"]["state"][key])


REFUSED = [
    (["SOLVER.AMP", "fp16"], r"SOLVER\.AMP fp16"),
    (["SOLVER.ACCUMULATE", 2], r"SOLVER\.ACCUMULATE 2"),
    (["SOLVER.EMA", 0.9], r"SOLVER\.EMA 0\.9"),
    (["SOLVER.SKIP_NONFINITE", 1], r"SOLVER\.SKIP_NONFINITE 1"),
    (["SOLVER.COMPILE", True], r"SOLVER\.COMPILE True"),
    (["SOLVER.SCHEDULE_BY", "step"], r"SOLVER\.SCHEDULE_BY step"),
    (["DISTILLER.TEACHER_CACHE", "memory"], r"DISTILLER\.TEACHER_CACHE memory"),
    (["DISTILLER.TEACHER_AUGMENT", "weak"], r"DISTILLER\.TEACHER_AUGMENT weak"),
]


def test_settings_whose_steps_cannot_be_recorded_are_refused(tmp_path, stand_in, monkeypatch):
    for words, names in REFUSED:
        with pytest.raises(UserError, match=f"CUDA_GRAPHS True does not work with {names}"):
            BaseTrainer.check(config(tmp_path, words=words))

    class Other(BaseTrainer):
        pass

    with pytest.raises(UserError, match=r"does not work with SOLVER\.TRAINER base"):
        Other.check(config(tmp_path))
    with pytest.raises(UserError, match="does not work in lock-step"):
        train_together([config(tmp_path)])
    monkeypatch.setattr(captured, "world_size", lambda: 2)
    with pytest.raises(UserError, match="does not work with 2 processes"):
        BaseTrainer.check(config(tmp_path))
    stand_in.device_type = "cuda"
    with pytest.raises(UserError, match="does not work with DEVICE cpu"):
        BaseTrainer.check(config(tmp_path))


def count_steps(self, **batch):
    self.calls = getattr(self, "calls", 0) + 1


def keep_a_tensor(self, **batch):
    self.last = batch["target"] + 0


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (count_steps, "changes its calls"),
        (keep_a_tensor, "changes its last"),
    ],
)
def test_a_step_with_state_in_python_is_refused(tmp_path, stand_in, monkeypatch, act, what):
    whole = KD.forward_train

    def forward_train(self, image, target, **batch):
        act(self, target=target, **batch)
        return whole(self, image, target, **batch)

    monkeypatch.setattr(KD, "forward_train", forward_train)
    with pytest.raises(UserError, match=f"CUDA_GRAPHS to False: a step of KD {what}"):
        train(config(tmp_path))


def test_a_step_that_draws_random_numbers_on_the_host_is_refused(tmp_path, stand_in):
    """As CRD's negatives on a CPU."""
    with pytest.raises(UserError, match="a step of CRD changes torch's random generator"):
        train(config(tmp_path, "CRD"))


def test_a_recording_that_fails_or_does_something_else_is_refused(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "replay", lambda self: None)
    with pytest.raises(UserError, match="changes other values when it is replayed"):
        train(config(tmp_path / "idle"))

    def record(self, function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(stand_in, "record", record)
    with pytest.raises(UserError, match=r"cannot be recorded \(operation not permitted when"):
        train(config(tmp_path / "failing"))


def test_a_hook_within_the_step_is_refused(tmp_path, stand_in):
    class Watching(Hook):
        def after_update(self, trainer):
            pass

    with pytest.raises(UserError, match="does not work with the hook Watching"):
        train(config(tmp_path), hooks=[Watching()])


class AsOnAGpu(Hook):
    """Leaves the optimizer's groups as recorded steps do, and stops in the second epoch."""

    def after_epoch(self, trainer, epoch, record):
        trainer.optimizer.param_groups[0]["capturable"] = True

    def before_epoch(self, trainer, saved):
        if trainer.epoch == 1:
            raise KeyboardInterrupt


def test_a_run_of_recorded_steps_goes_on_without_them(tmp_path):
    """Adam refuses `capturable` on a CPU."""
    cfg = config(tmp_path, words=["SOLVER.CUDA_GRAPHS", False, "SOLVER.TYPE", "Adam"])
    with pytest.raises(KeyboardInterrupt):
        train(cfg, hooks=[AsOnAGpu()])
    state, _ = left_by(tmp_path)
    assert state["optimizer"]["param_groups"][0]["capturable"] is True
    train(cfg, resume=True)
    assert left_by(tmp_path)[0]["epoch"] == 2
