"""Epochs whose last batch has one image: joined to the one before where a network needs two."""

import copy

import pytest
import torch
from support import same_state, write_config
from torch import nn

from mdistiller.cli import train as train_command
from mdistiller.dataset.sampler import DistributedBatchSampler
from mdistiller.models import get_model_entry
from mdistiller.networks import lone_image
from mdistiller.networks.lone_image import try_step

SHUFFLENET = "torchvision/shufflenet_v2_x0_5"  # normalises maps of one pixel


def train(folder, capsys, student, size, *words):
    """Run an epoch of 160 digits; returns the exit status and all that was printed."""
    path = write_config(folder, "", "NONE", student, epochs=1)
    status = train_command.main(["--cfg", str(path), "SOLVER.BATCH_SIZE", str(size), *words])
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize(("count", "steps"), [(32, 2), (33, 2), (34, 3), (35, 3)])
def test_a_plan_joins_only_a_lone_image(count, steps):
    plan = DistributedBatchSampler(count, 16, min_per_rank=2)
    assert len(plan) == steps
    assert plan.smallest >= 2
    spans = [plan.local_batch(step) for step in range(steps)]
    assert [index for span in spans for index in range(*span)] == list(range(count))


def test_parts_of_a_batch_keep_the_view_of_the_teacher():
    image = torch.arange(3.0)
    image.teacher_view = -image
    one = lone_image._first({"image": image, "epoch": 1}, 1)
    for images, weak in ((one["image"], [0]), (lone_image._twice(one)["image"], [0, 0])):
        assert images.teacher_view.tolist() == weak
    assert not hasattr(lone_image._first({"image": image + 1}, 2)["image"], "teacher_view")


def test_each_process_of_several_has_two():
    assert DistributedBatchSampler(18, 8, 0, 2).smallest == 1
    plans = [DistributedBatchSampler(18, 8, rank, 2, min_per_rank=2) for rank in range(2)]
    assert [plan.local_batch(0) for plan in plans] == [(0, 9), (9, 18)]
    assert [(len(plan), plan.loss_weight(0)) for plan in plans] == [(1, 1), (1, 1)]


def test_a_network_that_needs_two_images_trains(tmp_path, capsys):
    status, text = train(tmp_path, capsys, SHUFFLENET, 53)
    assert status == 0, text
    assert "it joins the one before" in text


def test_one_that_needs_one_keeps_its_batches(tmp_path, capsys):
    status, text = train(tmp_path, capsys, "resnet8", 53)
    assert status == 0
    assert "joins" not in text


def test_batches_of_one_end_before_the_first_step_with_the_key(tmp_path, capsys):
    status, text = train(tmp_path, capsys, SHUFFLENET, 1)
    assert status != 0
    assert "SOLVER.BATCH_SIZE 1: Expected more than 1 value" in text
    assert "Traceback" not in text


def test_an_initialisation_stage_that_needs_two_images_is_tried_as_well(tmp_path, capsys):
    """FT's paraphraser, whose batch norms see the teacher's last maps of one pixel."""
    teacher = ("DISTILLER.TEACHER", "timm/test_resnet", "DISTILLER.TEACHER_CKPT")
    torch.manual_seed(0)
    torch.save(get_model_entry(teacher[1], "cifar")(num_classes=10).state_dict(), tmp_path / "t")
    words = (*teacher, str(tmp_path / "t"), "FT.INIT.EPOCHS", "1", "FT.BATCH_NORM", "both")
    status, text = train(tmp_path, capsys, "resnet8", 53, "DISTILLER.TYPE", "FT", *words)
    assert status == 0, text
    assert "it joins the one before" in text


OWN = """
from mdistiller.distillers import DISTILLERS, Vanilla
from mdistiller.engine.trainer import BaseTrainer, trainer_dict

@DISTILLERS.register("{name}")
class Asks(Vanilla):
    def forward_train(self, image, target, extra):
        return super().forward_train(image, target)

@trainer_dict.register("{name}")
class Trainer(BaseTrainer):
    def train_iter(self, data, epoch, meters):
        {line} = data
        _, losses = self.distiller(image=image, target=target, extra=None)
        self.optimizer.zero_grad()
        losses["loss_ce"].backward()
        self.optimizer.step()
        meters["losses"].update(losses["loss_ce"].item(), len(target))
"""


@pytest.mark.parametrize(
    ("line", "method"), [("image, image_s, target, index", "NONE"), ("image, target, index", "")]
)
def test_a_trainer_that_takes_batches_apart_itself(tmp_path, capsys, line, method):
    """Where its method wants what it alone gives, the student alone is tried."""
    name = f"OWN{len(line)}{method}"
    (tmp_path / "own.py").write_text(OWN.format(name=name, line=line))
    words = ("--import", str(tmp_path / "own.py"), "SOLVER.TRAINER", name)
    words += ("DISTILLER.TYPE", method or name)
    status, text = train(tmp_path, capsys, SHUFFLENET, 53, *words)
    assert status == 0, text
    assert "it joins the one before" in text


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(4), []

    def forward(self, image):
        self.calls.append(torch.rand(1))
        return None, {"loss": self.norm(image).std(0).sum()}


def test_a_trial_leaves_no_trace():
    net = Norm()
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert "more than 1 value" in try_step(net, {"image": torch.ones(1, 4)})
    image = torch.ones(3, 4)
    assert try_step(net, {"image": image}) is None
    assert same_state(before, net.state_dict())
    assert net.calls == []
    assert torch.equal(torch.get_rng_state(), drawn)
