"""Several teachers: how their outputs and losses are combined, against float64 references."""

import math

import pytest
import torch
from rough import hostile_logits
from support import golden_values

from mdistiller.distillers import (
    TeacherEnsemble,
    TeacherTeam,
    check_several,
    distiller_dict,
    get_distiller,
    several,
)
from mdistiller.distillers._teachers import confidences
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

TARGET = torch.tensor([0, 3, -100, 4])
BATCH = {
    "image": golden_values((4, 3, 16, 16), 1).float(),
    "target": torch.tensor([0, 3, 1, 4]),
    "index": torch.arange(4),
    "epoch": 30,
}


def softmax(values, temperature=1.0):
    shares = [math.exp(v / temperature) for v in values]
    return [share / sum(shares) for share in shares]


def kd(taught, learning, temperature=4.0):
    q, p = softmax(taught, temperature), softmax(learning, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def nets(count=3):
    torch.manual_seed(0)
    student, *teachers = (get_model_entry("resnet8", "cifar")(num_classes=5) for _ in range(count))
    for number, teacher in enumerate(teachers):
        teacher.fc.weight.data *= 10 * (number + 1)
    return student, teachers


def build(method, combine, weights=(3.0, 1.0), *pairs):
    cfg = default_config()
    cfg.merge_from_list(list(pairs))
    student, teachers = nets()
    kind = TeacherEnsemble if combine == "ensemble" else TeacherTeam
    cls = get_distiller(method)
    cls = cls if combine == "ensemble" else several(cls, combine)
    team = kind(teachers, weights)
    facts = {"image_size": (16, 16), "targets": torch.arange(40) % 5}
    return cls.build(student, team, cfg, 40, **facts).train()


def logits_of(distiller):
    """Rows of the student, and of each teacher, on BATCH."""
    student = distiller(**BATCH)[0]
    with torch.no_grad():
        taught = [net(BATCH["image"])[0] for net in distiller.teacher.nets]
    return [z.double().tolist() for z in (student, *taught)]


def test_losses_are_averaged_by_weight():
    distiller = build("KD", "losses")
    student, *teachers = logits_of(distiller)
    means = [sum(map(kd, taught, student)) / 4 for taught in teachers]
    want = 0.9 * (0.75 * means[0] + 0.25 * means[1])
    assert distiller(**BATCH)[1]["loss_kd"].item() == pytest.approx(want, rel=1e-4)
    assert distiller.metrics["loss_teacher2"].item() == pytest.approx(0.9 * means[1], rel=1e-4)


def test_an_ensemble_is_one_teacher_with_the_mean_probabilities():
    distiller = build("KD", "ensemble")
    student, first, second = logits_of(distiller)
    total = 0.0
    for n in range(4):
        pairs = zip(softmax(first[n]), softmax(second[n]), strict=True)
        total += kd([math.log(0.75 * a + 0.25 * b) for a, b in pairs], student[n])
    assert distiller(**BATCH)[1]["loss_kd"].item() == pytest.approx(0.9 * total / 4, rel=1e-4)


def by_hand(logits, target):
    """c of each teacher and sample, from lists of rows."""
    weights = []
    for n, y in enumerate(target):
        if y < 0:
            weights.append([1 / len(logits)] * len(logits))
            continue
        inverse = [1 / softmax(rows[n])[y] for rows in logits]  # exp of the cross-entropy
        weights.append([(1 - h / sum(inverse)) / (len(logits) - 1) for h in inverse])
    return torch.tensor(weights, dtype=torch.float64).T


def test_confidence_weights_each_sample_by_the_teachers_cross_entropy():
    logits = [3 * golden_values((4, 5), seed) for seed in (1, 2, 3)]
    want = by_hand([z.tolist() for z in logits], TARGET.tolist())
    torch.testing.assert_close(confidences(logits, TARGET), want)
    one_hot = torch.nn.functional.one_hot(TARGET.clamp(min=0), 5).double()
    torch.testing.assert_close(confidences(logits, one_hot)[:, [0, 1, 3]], want[:, [0, 1, 3]])
    distiller = build("KD", "confidence", (1.0, 1.0))
    student, *teachers = logits_of(distiller)
    weights = by_hand(teachers, BATCH["target"].tolist())
    total = sum(
        weights[k, n].item() * kd(teachers[k][n], student[n]) for k in range(2) for n in range(4)
    )
    assert distiller(**BATCH)[1]["loss_kd"].item() == pytest.approx(0.9 * total / 4, rel=1e-4)


def test_weights_of_any_finite_logits_are_finite_and_sum_to_one():
    for first in hostile_logits().values():
        for second in hostile_logits().values():
            weights = confidences([first, second, -first], torch.arange(len(first)))
            torch.testing.assert_close(weights.sum(dim=0), torch.ones(len(first)))
            assert (weights >= -1e-6).all()


def test_rows_have_the_loss_as_their_mean():
    """Also where a sample has no label."""
    names = [name for name, cls in distiller_dict.items() if cls.has_rows()]
    assert {"KD", "DKD", "NKD", "LOGITS"} <= set(names)
    student, teachers = nets()
    for name in names:
        method = distiller_dict[name].build(student, teachers[0], default_config(), 4).eval()
        outputs = method.run_student(BATCH["image"]), method.run_teacher(BATCH["image"])
        for target in (TARGET, BATCH["target"]):
            rows = method.distill_rows(*outputs, target, epoch=30)
            assert rows.shape == (4,)
            whole = method.distill(*outputs, target, epoch=30)
            torch.testing.assert_close(rows.mean(), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["FITNET", "CRD", "KD+AT"])
def test_what_a_method_learns_is_there_once_for_each_teacher(method):
    distiller = build(method, "losses")
    single = distiller_dict if "+" not in method else {method: get_distiller(method)}
    student, teachers = nets()
    facts = {"image_size": (16, 16), "targets": torch.arange(40) % 5}
    one = single[method].build(student, teachers[0], default_config(), 40, **facts)
    counts = [len(x.extra_parameters()) for x in (one, distiller)]
    assert counts[1] == 2 * counts[0]
    groups = distiller.param_groups()
    assert (
        sum(len(group["params"]) for group in groups) == len(list(student.parameters())) + counts[1]
    )
    _, losses = distiller(**BATCH)
    losses["loss_kd"].backward()
    assert all(p.grad is not None for p in distiller.extra_parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())


REFUSED = {  # a training step or prediction of their own
    "losses": {"MLKD", "CRLD", "SIMKD"},
    "ensemble": {"AT", "FITNET", "CRD", "REVIEWKD", "SIMKD"},
    "confidence": {"AT", "CTKD", "KD+AT", "DIST", "MLKD"},
}


@pytest.mark.parametrize("combine", REFUSED)
def test_what_cannot_have_several_teachers_is_refused(combine):
    names = [name for name, cls in distiller_dict.items() if cls.uses_teacher]
    refused = set()
    for name in [*names, "KD+AT"]:
        try:
            check_several(name, combine)
        except UserError as error:
            refused.add(name if f"{name} cannot learn from several teachers" in str(error) else "")
    assert REFUSED[combine] <= refused
    assert refused.isdisjoint({"", "KD", "DKD", "NKD"})
    with pytest.raises(UserError, match="leave out WEIGHT"):
        check_several("KD", "confidence", weighted=True)
