"""SEED: the loss, the queue, several processes."""

import math

import pytest
import torch
from crd_processes import Net
from support import golden_values

from mdistiller.distillers import Output
from mdistiller.distillers.helpers.losses.numerics import unit
from mdistiller.distillers.SEED import SEED, seed_loss
from mdistiller.engine.cfg import default_config


def test_the_loss_is_the_papers_sum():
    student, teacher, queue = (unit(golden_values((n, 6), n)) for n in (4, 3, 5))
    student, teacher = student[:3].clone().requires_grad_(), teacher
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        entries = [*queue.tolist(), z_t]

        def softmax(z, tau, entries=entries):
            powers = [
                math.exp(sum(a * b for a, b in zip(z, d, strict=True)) / tau) for d in entries
            ]
            return [power / sum(powers) for power in powers]

        p, q = softmax(z_s, 0.2), softmax(z_t, 0.07)
        total -= sum(a * math.log(b) for a, b in zip(q, p, strict=True))
    loss = seed_loss(student, teacher, queue, 0.2, 0.07)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: seed_loss(s, teacher, queue, 0.2, 0.07), student)


def small(*settings):
    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(list(settings))
    return SEED(Net(5), Net(4), cfg, 30, image_size=(1, 2))


def test_the_queue_holds_the_newest_vectors_of_the_teacher():
    seed = small("SEED.QUEUE", 5)
    vectors = golden_values((7, 4), 1).float()
    batches = [vectors[:3], vectors[3:5], vectors[5:]]
    for batch in batches:
        output = Output(torch.zeros(len(batch), 2), {"pooled_feat": batch})
        student = Output(output.logits, {"pooled_feat": torch.ones(len(batch), 5)})
        seed.distill(student, output, torch.zeros(len(batch)).long())
    wanted = unit(vectors[[5, 6, 2, 3, 4]])
    torch.testing.assert_close(seed.queue, wanted)
    assert seed.position == 2
    before = seed.queue.clone()
    seed.eval().distill(student, output, torch.zeros(2).long())  # of an evaluation
    assert torch.equal(seed.queue, before)
    seed.train().enqueue(unit(vectors))  # more than it holds
    torch.testing.assert_close(seed.queue.sort(0).values, unit(vectors[2:]).sort(0).values)


def test_the_loss_has_its_weight():
    rows = golden_values((3, 5), 1).float(), golden_values((3, 4), 2).float()
    losses = []
    for weight in (1, 3):
        outputs = (Output(torch.zeros(3, 2), {"pooled_feat": x}) for x in rows)
        seed = small("SEED.LOSS.FEAT_WEIGHT", weight)
        losses.append(seed.distill(*outputs, torch.zeros(3).long()))
    torch.testing.assert_close(losses[1], 3 * losses[0])


def test_the_queue_is_no_longer_than_the_data():
    assert len(small().queue) == 30


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.full((3, 4), 3e38)])
def test_the_loss_is_finite_for_any_features(rows):
    seed = small()
    student = torch.full((3, 5), 1e4, requires_grad=True)
    outputs = (Output(torch.zeros(3, 2), {"pooled_feat": x}) for x in (student, rows))
    loss = seed.distill(*outputs, torch.zeros(3).long())
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
