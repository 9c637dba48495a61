"""MLKD: recorded values, a plain reference, rough logits, the training step."""

import pytest
import torch
from modern_golden import CASES, check_golden, golden_inputs
from support import golden_values
from torch import nn

from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.distillers.MLKD import mlkd_terms
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

TEMPS = [4.0, 3.0, 5.0, 2.0, 6.0]


class Logits(nn.Module):
    """A network whose image is its logits, times a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, image):
        return self.scale * image, {}


def distiller(student, teacher, *settings):
    cfg = default_config()
    cfg.merge_from_list(list(settings))
    return distiller_dict["MLKD"].build(student, teacher, cfg, 50, (32, 32)).train()


def losses_of(tensors, settings):
    """Loss terms and metrics of the distiller on recorded logits of two views."""
    model = distiller(Logits(), Logits(), *settings)
    teacher = iter([tensors["zt"], tensors["zt2"]])
    model.teacher.forward = lambda image: (next(teacher), {})
    views = tensors["zs"], tensors["zs2"]
    _, losses = model(image=views, target=tensors["y"], epoch=1)
    return losses, model.metrics


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("mlkd", []),
        ("mlkd_intended", ["MLKD.MASK", "per_item"]),
        ("mlkd_lskd", ["LSKD.ENABLE", True, "MLKD.LOSS.KD_WEIGHT", 9.0]),
    ],
)
def test_recorded_values(case, settings):
    hyper = CASES[case]["hyper"]
    settings = [*settings, "MLKD.TEMPS", hyper["temps"]]
    assert hyper["ce_weight"] == default_config().MLKD.LOSS.CE_WEIGHT
    check_golden(case, lambda tensors, _: sum(losses_of(tensors, settings)[0].values()))
    losses, metrics = losses_of(golden_inputs(case), settings)
    terms = CASES[case]["terms"]
    weight = hyper["kd_weight"]
    assert losses["loss_ce"].item() == pytest.approx(terms["loss_ce"], rel=1e-8)
    assert weight * metrics["cc"].item() == pytest.approx(terms["loss_cc"], rel=1e-8)
    assert weight * metrics["bc"].item() == pytest.approx(terms["loss_bc"], rel=1e-8)
    kd = weight * (metrics["kd_weak"] + metrics["kd_strong"]).item()
    assert kd == pytest.approx(terms["loss_kd"], rel=1e-8)


def textbook_per_item(weak, strong, temps):
    """Sample by sample, class by class, in Python floats."""
    z, v = weak
    n, c = z.shape
    confident = sorted(v.softmax(1).amax(1).tolist())[(n - 1) // 2]
    frequent = sorted(v.softmax(1).sum(0).tolist())[(c - 1) // 2]
    samples = [row.max().item() <= confident for row in v.softmax(1)]
    classes = [column.sum().item() <= frequent for column in v.softmax(1).T]
    terms = dict.fromkeys(("kd_weak", "kd_strong", "cc", "bc"), 0.0)
    for t in temps:
        p, q = (z / t).softmax(1).tolist(), (v / t).softmax(1).tolist()
        for name, (student, teacher) in (("kd_weak", weak), ("kd_strong", strong)):
            for i in range(n):
                a, b = (student[i] / t).log_softmax(0), (teacher[i] / t).log_softmax(0)
                if name == "kd_strong" or samples[i]:
                    terms[name] += t**2 / n * (b.exp() * (b - a)).sum().item()
        for i in range(c):
            for j in range(c):
                own = sum(p[k][i] * p[k][j] for k in range(n))
                other = sum(q[k][i] * q[k][j] for k in range(n))
                terms["cc"] += classes[i] * (own - other) ** 2 / c
        for i in range(n):
            for j in range(n):
                own = sum(a * b for a, b in zip(p[i], p[j], strict=True))
                other = sum(a * b for a, b in zip(q[i], q[j], strict=True))
                terms["bc"] += samples[i] * (own - other) ** 2 / n
    return terms


def test_per_item_masks_equal_the_textbook_for_an_odd_batch():
    logits = [5 * golden_values((7, 6), seed) for seed in range(4)]
    weak, strong = logits[:2], logits[2:]
    got = mlkd_terms(tuple(weak), tuple(strong), TEMPS[:2], "per_item")
    want = textbook_per_item(weak, strong, TEMPS[:2])
    assert {name: term.item() for name, term in got.items()} == pytest.approx(want, rel=1e-9)


def test_as_coded_takes_the_weak_view_from_the_fourth_temperature_on():
    weak, strong = [tuple(5 * golden_values((8, 6), s) for s in pair) for pair in ((1, 2), (3, 4))]
    first, every = mlkd_terms(weak, strong, TEMPS[:3]), mlkd_terms(weak, strong, TEMPS)
    of_weak = mlkd_terms(weak, weak, TEMPS[3:])["kd_strong"]
    assert every["kd_strong"].item() == pytest.approx((first["kd_strong"] + of_weak).item())


def test_equal_networks_have_nothing_to_distil():
    z = 5 * golden_values((8, 6), 1).requires_grad_()
    z2 = 5 * golden_values((8, 6), 2).requires_grad_()
    for mask in ("as_coded", "per_item"):
        value = sum(mlkd_terms((z, z.detach()), (z2, z2.detach()), TEMPS, mask).values())
        gradients = torch.autograd.grad(value, [z, z2])
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert max(g.abs().max() for g in gradients) < 1e-12


def networks():
    torch.manual_seed(0)
    entry = get_model_entry("resnet8", "cifar")
    return entry(num_classes=10), entry(num_classes=10)


def test_each_view_has_a_student_forward_of_its_own():
    """Batch norm counts two batches, and weak logits do not depend on the strong view."""
    images = torch.randn(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = distiller(*networks())
    logits, _ = model(image=[images[0], images[1]], target=torch.arange(4), epoch=1)
    assert int(model.student.bn1.num_batches_tracked) == 2
    assert int(model.teacher.bn1.num_batches_tracked) == 0
    again, _ = distiller(*networks())(image=[images[0], images[2]], target=torch.arange(4), epoch=1)
    assert torch.equal(logits, again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["MLKD.MASK", "coded"], r"MLKD\.MASK 'coded' is not one of as_coded, per_item"),
        (["MLKD.TEMPS", []], r"MLKD\.TEMPS is empty"),
        (["MLKD.TEMPS", [4.0, 0.0]], r"MLKD\.TEMPS must be positive, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        distiller(*networks(), *settings)


def test_it_cannot_be_a_part_of_a_sum():
    from mdistiller.distillers import get_distiller

    with pytest.raises(UserError, match="MLKD cannot be combined"):
        get_distiller("MLKD+AT")


def test_a_method_wants_two_views_if_it_says_so_or_names_them():
    class Named(Distiller):
        def forward_train(self, image_weak, image_strong, target, **kwargs):
            return image_weak, {"loss_ce": image_strong.sum() + kwargs["epoch"]}

    class Child(Named):
        pass

    class Said(Distiller):
        two_views = True

    assert Named.two_views
    assert Child.two_views
    assert Said.two_views
    assert distiller_dict["MLKD"].two_views
    assert not distiller_dict["KD"].two_views
    weak, strong = torch.zeros(2), torch.ones(2)
    for images in ({"image": (weak, strong)}, {"image_weak": weak, "image_strong": strong}):
        logits, losses = Child(*networks()).train()(**images, target=weak, index=weak, epoch=3)
        assert logits is weak
        assert losses["loss_ce"] == 5


VIEWS = {
    "image_w, image_s, target": ("image_w", "image_s"),
    "target, image_strong, image_weak": ("image_weak", "image_strong"),
    "image_aug_0, image_aug_1, target": ("image_aug_0", "image_aug_1"),
    "image, image_strong, target": ("image", "image_strong"),
    "image, image_size, target": None,
    "image, target": None,
}


@pytest.mark.parametrize("arguments", VIEWS)
def test_views_go_by_the_arguments_that_begin_with_image(arguments):
    scope = {"Distiller": Distiller}
    text = f"class Forked(Distiller):\n    def forward_train(self, {arguments}, **kwargs):\n"
    exec(f"{text}        return target, locals()\n", scope)
    views, pair = VIEWS[arguments], (torch.zeros(2), torch.ones(2))
    assert scope["Forked"].two_views == (views is not None)
    if views:
        _, got = scope["Forked"](*networks()).train()(image=pair, target=pair[0], epoch=1)
        assert [got[name] for name in views] == list(pair)
