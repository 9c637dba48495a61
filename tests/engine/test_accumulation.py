"""SOLVER.ACCUMULATE in one process: the large batch, in parts."""

import json

import pytest
import torch
from support import saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.dataset.sampler import DistributedBatchSampler
from mdistiller.engine.trainer import BaseTrainer, trainer_dict


def train(folder, batch, accumulate, solver="", code=0, **settings):
    folder.mkdir()
    text = f"SOLVER:\n  BATCH_SIZE: {batch}\n  ACCUMULATE: {accumulate}\n{solver}"
    settings = {"method": "KD", "student": "BabyStudent", "epochs": 2, **settings}
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    config = write_config(folder, text=text, **settings, **teacher)
    assert train_command.main(["--cfg", str(config)]) == code
    return folder / "out" / "toy" / "run"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "solver",
    [
        "  LR: 0.1\n",
        "  TRAINER: dot\n  CLIP_GRAD_NORM: 0.3\n",
        "  TRAINER: dot\n  CLIP_GRAD_NORM: 0.3\n  AMP: fp16\n",
    ],
    ids=["base", "dot, clipped", "dot, clipped, fp16"],
)
def test_parts_of_a_batch_train_like_the_whole(tmp_path, solver):
    """74 images in batches of 48; in parts of 12 the last step has 3 of them, of 12, 12 and 2."""
    half = "fp16" in solver
    settings = {"solver": f"{solver}DATASET: {{VAL_SPLIT: 86}}\n", "epochs": 1}
    whole = train(tmp_path / "a", 48, 1, **settings)
    parts = train(tmp_path / "b", 12, 4, **settings)
    for one, two in zip(rows(whole), rows(parts), strict=True):
        for key in ("train_loss", "train_loss_kd", "test_loss"):
            assert two[key] == pytest.approx(one[key], rel=5e-3 if half else 2e-5, abs=1e-6), key
    states = [torch.load(run / "student_latest")["model"] for run in (whole, parts)]
    for key, value in states[0].items():
        close = {"rtol": 0.05, "atol": 2e-3} if half else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(states[1][key], value, **close)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("num_data", [96, 97, 105, 130])
def test_weights_of_a_group_add_up_to_the_mean_over_its_samples(num_data, world):
    """Every sample of a step counts alike, whichever process and micro-batch it is in."""
    plans = [DistributedBatchSampler(num_data, 8, rank, world) for rank in range(world)]
    steps = len(plans[0])
    for begin in range(0, steps, 3):
        group = range(begin, min(begin + 3, steps))
        size = plans[0].batch(group[-1])[1] - plans[0].batch(begin)[0]
        for plan in plans:
            for step in group:
                first, last = plan.local_batch(step)
                of_one = plan.loss_weight(step, 3) / (last - first) / world
                assert of_one == pytest.approx(1 / size)


def test_a_loader_that_gives_no_weights_has_batches_of_one_size(tmp_path):
    class Plain(trainer_dict["base"]):
        seen = ()

        def __init__(self, *args):
            super().__init__(*args)
            self.train_loader = list(self.train_loader)

        def loss_weight(self):
            self.seen = (*self.seen, super().loss_weight())
            return self.seen[-1]

    from mdistiller.dataset import load_data
    from mdistiller.distillers import Vanilla
    from mdistiller.engine.cfg import load_config
    from mdistiller.engine.metrics import Meters
    from mdistiller.models import get_model_entry

    cfg = load_config(write_config(tmp_path), ["SOLVER.ACCUMULATE", "2"])
    data = load_data(cfg, torch.device("cpu"))
    net = get_model_entry("resnet8", "cifar")(num_classes=10)
    trainer = Plain("x", Vanilla(net), data.train, data.val, cfg)
    batches = enumerate(trainer.train_loader, start=1)
    for trainer.step, batch in batches:
        trainer.train_iter(batch, 1, Meters())
    assert trainer.seen == (0.5, 0.5, 0.5, 0.5, 1.0)


def test_more_parts_than_an_epoch_has_are_refused(tmp_path, capsys):
    train(tmp_path / "a", 32, 6, code=2)
    assert "SOLVER.ACCUMULATE 6 is more than the 5 batches" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["ACCUMULATE: 2", "EMA: 0.5"])
def test_a_trainer_with_steps_of_its_own_is_refused(tmp_path, monkeypatch, capsys, key):
    class Own(BaseTrainer):
        def train_iter(self, data, epoch, train_meters):
            raise AssertionError("never reached")

    class Adds(BaseTrainer):
        own_steps = False

        def train_iter(self, data, epoch, train_meters):
            return super().train_iter(data, epoch, train_meters)

    monkeypatch.setitem(trainer_dict, "own", Own)
    monkeypatch.setitem(trainer_dict, "adds", Adds)
    for name, code in (("own", 2), ("adds", 0)):
        text = f"SOLVER:\n  TRAINER: {name}\n  {key}\n"
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, text=text, student="BabyStudent", epochs=1)
        assert train_command.main(["--cfg", str(config)]) == code
    error = capsys.readouterr().err
    assert f"SOLVER.{key.split(':')[0]} has no effect on SOLVER.TRAINER own" in error
