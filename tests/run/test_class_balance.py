"""Class weights and label smoothing of the cross-entropy with the labels."""

import json

import pytest
import torch
import torch.nn.functional as F
from support import saved_teacher, write_config

from mdistiller.dataset import load_data
from mdistiller.distillers import DISTILLERS, Distiller, cross_entropy
from mdistiller.engine.cfg import load_config
from mdistiller.registry import UserError, is_builtin
from mdistiller.run.build import build_distiller

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(saved_teacher(tmp_path_factory.mktemp("teacher")))


def build(folder, teacher, method, *words):
    text = "DATASET:\n  TYPE: tiny16\n"
    facts = {"method": method, "TEACHER": "resnet8", "TEACHER_CKPT": teacher}
    cfg = load_config(write_config(folder, text, **facts), words)
    data = load_data(cfg, CPU)
    return build_distiller(cfg, data, CPU), data


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_sample_has_the_weight_of_its_class_and_unlabelled_ones_none(smoothing):
    """Not one weight for each class of the smoothed label, as torch's cross-entropy has it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator).double()
    target = torch.tensor([0, 3, -100, 1, 0, 2])
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5])
    share = F.one_hot(target.clamp(min=0), 4).double() * (1 - smoothing) + smoothing / 4
    rows = -(share * logits.log_softmax(1)).sum(1) * weights[target.clamp(min=0)]
    rows[2] = 0
    loss = cross_entropy(logits, target, smoothing, weights.double())
    assert loss.item() == pytest.approx(rows.sum().item() / 5, rel=1e-12)
    halves = [
        cross_entropy(logits[a:b], target[a:b], smoothing, weights.double()) * n
        for a, b, n in ((0, 3, 2), (3, 6, 3))
    ]  # two processes' parts
    assert loss.item() == pytest.approx(sum(halves).item() / 5, rel=1e-12)
    hard = F.one_hot(target[3:], 4).double()
    mixed = 0.3 * hard + 0.7 * hard.flip(0)
    want = sum(
        part * cross_entropy(logits[3:], labels.argmax(1), smoothing, weights.double())
        for part, labels in ((0.3, hard), (0.7, hard.flip(0)))
    )
    got = cross_entropy(logits[3:], mixed, smoothing, weights.double())
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_every_method_of_the_library_has_them():
    own = {name: cls for name, cls in DISTILLERS.items() if is_builtin(cls)}
    assert len(own) > 30
    assert [name for name, cls in own.items() if not cls.uses_hard_label_loss] == []


@pytest.mark.parametrize("method", ["NONE", "KD", "USKD", "MLKD", "KD+AT"])
def test_weights_change_the_cross_entropy_alone(tmp_path, teacher, method):
    distiller, data = build(tmp_path, teacher, method, "DISTILLER.CLASS_WEIGHTS", "inverse")
    counts = data.train.dataset.targets.bincount()
    weights = distiller.ce_class_weights
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    torch.testing.assert_close(weights * counts, (weights * counts).mean().expand(10))
    assert "ce_class_weights" not in distiller.state_dict()
    image, target = torch.randn(2, 3, 16, 16), torch.tensor([4, 4])
    images = {"image": (image, image + 1) if distiller.two_views else image}

    def losses():
        distiller.train()
        return distiller(**images, target=target, epoch=1, index=torch.arange(2))[1]

    weighted = losses()
    distiller.ce_class_weights = None
    plain = losses()
    once = plain.pop("loss_ce").item()
    assert weighted.pop("loss_ce").item() == pytest.approx(once * weights[4].item(), rel=1e-5)
    assert weighted == plain
    distiller.label_smoothing = 0.5
    assert losses()["loss_ce"].item() != pytest.approx(once, rel=1e-3)


def test_a_list_is_scaled_and_smoothing_replaces_the_methods(tmp_path, teacher):
    words = ["DISTILLER.CLASS_WEIGHTS", json.dumps([2] * 10), "SOLVER.LABEL_SMOOTHING", "0.3"]
    distiller, _ = build(tmp_path, teacher, "OFA", *words)
    assert distiller.ce_class_weights.tolist() == pytest.approx([1.0] * 10)
    assert distiller.label_smoothing == 0.3
    assert build(tmp_path, teacher, "OFA")[0].label_smoothing == 0.1


@DISTILLERS.register("OWN_LOSS")
class OwnLoss(Distiller):
    uses_teacher = False

    def __init__(self, student, teacher, cfg):
        super().__init__(student, None)

    def forward_train(self, image, target, **batch):
        logits = self.student(image)[0]
        return logits, {"loss_ce": F.cross_entropy(logits, target)}


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("KD", ["DISTILLER.CLASS_WEIGHTS", "[1, 2]"], "has 2 weights, but the data have 10"),
        ("KD", ["DISTILLER.CLASS_WEIGHTS", "[1, -2]"], "none, inverse or a list of one weight"),
        ("KD", ["DISTILLER.CLASS_WEIGHTS", "balanced"], "none, inverse or a list of one weight"),
        ("KD", ["SOLVER.LABEL_SMOOTHING", "1"], "must be below 1"),
        (
            "OWN_LOSS",
            ["SOLVER.LABEL_SMOOTHING", "0.1"],
            "call self.hard_label_loss(logits, target)",
        ),
        ("SIMKD", ["DISTILLER.CLASS_WEIGHTS", "inverse"], "has the weight 0"),
        (
            "KD",
            ["DISTILLER.CLASS_WEIGHTS", "inverse", "DATASET.SAMPLER", "balanced"],
            "twice together",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, teacher, method, words, message):
    with pytest.raises(UserError) as error:
        build(tmp_path, teacher, method, *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
