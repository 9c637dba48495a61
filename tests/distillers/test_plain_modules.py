"""Methods on plain torch modules, without the zoo and without a trainer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdistiller.distillers import KD, Distiller, FitNet
from mdistiller.engine.cfg import default_config
from mdistiller.models import as_staged
from mdistiller.registry import UserError


def classifier():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def batch():
    return {"image": torch.randn(4, 3, 16, 16), "target": torch.tensor([0, 4, 2, 0])}


def test_a_logit_method_trains_two_modules_that_return_logits():
    student, teacher, given = classifier(), classifier(), batch()
    distiller = KD(student, teacher, default_config()).train()
    logits, losses = distiller(**given, epoch=1)
    teacher_p = (teacher(given["image"]) / 4).softmax(dim=1)
    expected = F.kl_div((logits / 4).log_softmax(dim=1), teacher_p, reduction="batchmean") * 16
    assert losses["loss_kd"].item() == pytest.approx(0.9 * expected.item(), rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert distiller.eval()(image=given["image"]).shape == (4, 5)


def test_a_map_method_says_what_it_misses_and_works_on_wrapped_modules():
    with pytest.raises(UserError, match=r"needs 'feats', which the network does not return"):
        FitNet(classifier(), classifier(), default_config())
    nets = [as_staged(classifier(), name, (16, 16)) for name in ("student", "teacher")]
    _, losses = FitNet(*nets, default_config()).train()(**batch())
    assert losses["loss_kd"].requires_grad


class Reports(nn.Linear):
    def forward(self, x):
        return {"out": super().forward(x.mean((2, 3)))}


def test_another_output_is_refused_with_what_to_wrap():
    class Sum(Distiller):
        def distill(self, student, teacher, target, **batch):
            return (student.logits - teacher.logits).sum()

    with pytest.raises(UserError, match=r"Reports returned a dict of 1 item.*as_staged\(net, name"):
        Sum(Reports(3, 5), Reports(3, 5)).train()(**batch())
