"""TFKD and PSKD, which learn without a teacher, against float64 references."""

import math

import pytest
import torch
from support import golden_values

from mdistiller.distillers import distiller_dict
from mdistiller.distillers.PSKD import pskd_loss
from mdistiller.distillers.TFKD import tfkd_loss, virtual_teacher
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

LOGITS = 3 * golden_values((6, 5), 1)
TARGET = torch.tensor([0, 3, -100, 4, 1, 3])
LABELLED = [n for n in range(6) if TARGET[n] >= 0]


def softmax(values, temperature=1.0):
    shares = [math.exp(v / temperature) for v in values]
    return [share / sum(shares) for share in shares]


def build(name, *pairs, num_data=12):
    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(list(pairs))
    net = get_model_entry("resnet8", "cifar")(num_classes=5)
    return distiller_dict[name].build(net, None, cfg, num_data, (8, 8)).train()


def batch(seed=1, **more):
    image = golden_values((6, 3, 8, 8), seed).float()
    return {"image": image, "target": TARGET, "index": torch.arange(6), "epoch": 1, **more}


def test_tfkd_is_kd_from_the_virtual_teacher_on_the_labelled():
    total = 0.0
    for n in LABELLED:
        taught = [0.9 if c == TARGET[n] else 0.025 for c in range(5)]
        q = softmax([math.log(p) for p in taught], 4.0)
        p = softmax(LOGITS[n].tolist(), 4.0)
        total += 16 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    assert tfkd_loss(LOGITS, TARGET, 0.9, 4.0).item() == pytest.approx(total / 5, rel=1e-6)


def test_tfkd_on_mixed_labels():
    mixed = torch.tensor([[0.7, 0.0, 0.3, 0.0, 0.0]])
    got = virtual_teacher(mixed, 5, 0.9).exp()
    want = 0.7 * virtual_teacher(TARGET[:1], 5, 0.9).exp()
    want += 0.3 * virtual_teacher(torch.tensor([2]), 5, 0.9).exp()
    torch.testing.assert_close(got, want)


def test_pskd_mixes_the_label_and_the_prediction_of_the_epoch_before():
    distiller = build("PSKD", "PSKD.ALPHA", 0.5, "SOLVER.EPOCHS", 4)
    first, losses = distiller(**batch())
    assert losses["loss_kd"].item() == pytest.approx(losses["loss_ce"].item() / 7)  # 1/8 : 7/8
    logits, losses = distiller(**batch(seed=2, epoch=2))
    total, alpha = 0.0, 0.5 * 2 / 4
    for n in LABELLED:
        past, now = (softmax(z[n].double().tolist()) for z in (first, logits))
        label = [float(c == TARGET[n]) for c in range(5)]
        soft = [(1 - alpha) * y + alpha * q for y, q in zip(label, past, strict=True)]
        total -= sum(a * math.log(b) for a, b in zip(soft, now, strict=True))
    assert sum(losses.values()).item() == pytest.approx(total / 5, rel=1e-5)
    losses["loss_kd"].backward()
    assert distiller.student.conv1.weight.grad.any()


def test_pskd_remembers_by_image_the_last_finite_prediction():
    distiller = build("PSKD")
    index = torch.tensor([7, 2, 7])
    logits = golden_values((3, 5), 4).float()
    distiller.remember(index, logits)
    want = torch.zeros(12, 5)
    want[2], want[7] = logits[1].softmax(0), logits[2].softmax(0)
    torch.testing.assert_close(distiller.state_dict()["predictions"], want)
    logits[1, 0] = math.nan
    distiller.remember(index, logits)
    torch.testing.assert_close(distiller.predictions, want)
    past = distiller.predictions[index].double()
    rows = [-(past[n] * LOGITS[n].log_softmax(0)).sum().item() for n in (0, 1)]
    got = pskd_loss(LOGITS[:3], past, TARGET[:3]).item()  # the third has no label
    assert got == pytest.approx(sum(rows) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("TFKD", "TFKD.A", 1.0, "TFKD.A must lie between 0 and 1, got 1.0"),
        ("TFKD", "TFKD.T", 0.0, "TFKD.T must be positive, got 0.0"),
        ("PSKD", "PSKD.ALPHA", 1.5, "PSKD.ALPHA must be within 0 and 1, got 1.5"),
    ],
)
def test_bad_settings(name, key, value, message):
    with pytest.raises(UserError, match=message):
        build(name, key, value)
