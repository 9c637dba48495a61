"""SDD, CATKD, SIMKD, SEMCKD as methods on networks."""

import pytest
import textbook_maps as textbook
import torch
import torch.nn.functional as F
from support import REPO
from test_distillers import batch

from mdistiller.distillers import get_distiller
from mdistiller.distillers.CATKD import catkd_loss
from mdistiller.distillers.helpers.features.heads import linear_head
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.SDD import region_logits
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.engine.optim import build_optimizer
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

METHODS = ["SDD", "CATKD", "SIMKD", "SEMCKD"]
HEADS = ["SDD", "CATKD", "SIMKD"]  # those that use the classifiers


def network(name, classes=10):
    return get_model_entry(name, "cifar")(num_classes=classes)


def build(method, *overrides, student="resnet8", teacher="resnet14", classes=10):
    torch.manual_seed(3)
    cfg = default_config()
    cfg.merge_from_list(overrides)
    nets = (network(name, classes) for name in (student, teacher))
    return get_distiller(method).build(*nets, cfg, num_data=50, image_size=(32, 32)).train()


def refusal(method, *overrides, **networks):
    with pytest.raises(UserError) as caught:
        build(method, *overrides, **networks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_of_several_layers_is_refused(method, role):
    says = refusal(method, **{role: "BabyStudent"})
    assert f"the {role} (BabyNet)" in says
    assert "linear layer on the average of their last map" in says


def test_the_others_can_be_combined():
    distiller = build("SDD+CATKD+SEMCKD")
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert all(p.grad.any() for p in distiller.get_learnable_parameters())
    assert {"loss_SDD", "loss_CATKD", "loss_SEMCKD"} <= set(distiller.metrics)


def configs(method):
    """The shipped configs of a method, each with the pair's name."""
    paths = (REPO / "configs" / "cifar100" / method.lower()).rglob("*.yaml")
    return [(path.stem, load_config(path)) for path in paths]


@pytest.mark.parametrize("method", METHODS)
def test_shipped_configs_are_of_their_method_and_pair(method):
    for pair, cfg in configs(method):
        assert method == cfg.DISTILLER.TYPE
        base = load_config(REPO / "configs" / "_base_" / "pairs" / f"{pair}.yaml")
        assert cfg.DISTILLER.STUDENT == base.DISTILLER.STUDENT
        assert (0.01 if pair.split("_")[-1] in ("mv2", "shuv1", "shuv2") else 0.05) == cfg.SOLVER.LR


def test_shipped_configs_of_semckd_have_the_published_weight():
    assert {cfg.SEMCKD.WEIGHT for _, cfg in configs("SEMCKD")} == {400}


# SDD


def test_sdd_standardises_the_logits_of_each_region():
    settings = ["SDD.BASE", "KD", "SDD.SCALES", [1, 2], "LSKD.ENABLE", True]
    distiller = build("SDD", *settings).double()
    items = batch()
    image = items["image"].double()
    _, losses = distiller(**items | {"image": image})
    regions = []
    for net in (distiller.student, distiller.teacher):
        fmap = net(image)[1]["final_map"]
        logits = textbook.region_logits(fmap, net.fc.weight, net.fc.bias, [1, 2])
        regions.append((logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True))
    # which regions count twice is the same: standardising keeps the order of the classes
    want = 0.9 * textbook.sdd_kd(*regions, items["target"], 4.0)
    assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1", "ShuffleV2", "MobileNetV2", "vgg8"])
def test_the_first_region_is_the_image(student):
    net = network(student).eval()
    with torch.no_grad():
        logits, features = net(batch()["image"])
        regions = region_logits(linear_head(net, "student"), features["final_map"], [1, 2, 4])
    assert regions.shape == (6, 10, 21)
    torch.testing.assert_close(regions[:, :, 0], logits)


def test_sdd_over_kd_is_the_textbook_on_both_networks_own_classifiers():
    distiller = build("SDD", "SDD.BASE", "kd", "SDD.SCALES", [1, 2, 4]).double()
    items = batch()
    image = items["image"].double()
    _, losses = distiller(**items | {"image": image})
    regions = []
    for net in (distiller.student, distiller.teacher):
        fmap = net(image)[1]["final_map"]
        regions.append(textbook.region_logits(fmap, net.fc.weight, net.fc.bias, [1, 2, 4]))
    want = 0.9 * textbook.sdd_kd(*regions, items["target"], 4.0)
    assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-9)
    plain = F.cross_entropy(distiller.student(image)[0], items["target"])
    assert losses["loss_ce"].item() == pytest.approx(0.1 * plain.item(), rel=1e-9)
    student = list(distiller.student.parameters())
    got, want = (torch.autograd.grad(x, student) for x in (losses["loss_kd"], want))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)
    assert 0 <= distiller.metrics["complementary"] <= 1


def test_sdd_warms_up_as_its_base_says():
    def term(epoch, *words):
        return build("SDD", *words)(**batch() | {"epoch": epoch})[1]["loss_kd"].item()

    assert term(5) == pytest.approx(term(20) / 4, rel=1e-5)
    assert term(1, "SDD.BASE", "KD") == term(20, "SDD.BASE", "KD")
    nkd = ["SDD.BASE", "NKD"]
    assert term(20, *nkd) != pytest.approx(term(20, *nkd, "SDD.NKD.FORM", "fixed"), rel=1e-3)


@pytest.mark.parametrize("base", ["KD", "DKD"])
def test_sdd_of_equal_networks_is_zero_and_stays(base):
    distiller = build("SDD", "SDD.BASE", base, teacher="resnet8").eval()
    distiller.student.load_state_dict(distiller.teacher.state_dict())
    image, target = batch()["image"], batch()["target"]
    student, teacher = distiller.run_student(image), distiller.run_teacher(image)
    loss = distiller.distill(student, teacher, target, epoch=20)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    grads = torch.autograd.grad(loss, list(distiller.student.parameters()))
    assert max(grad.abs().max() for grad in grads) < 1e-5


def test_sdd_refuses_settings_without_meaning():
    for words, says in (
        (["SDD.BASE", "kdd"], "SDD.BASE must be one of KD, DKD, NKD, got 'KDD'"),
        (["SDD.SCALES", [2, 4]], "SDD.SCALES must start with 1"),
        (["SDD.SCALES", [1, 0]], "SDD.SCALES must start with 1"),
        (["SDD.NORM", "max"], "SDD.NORM must be one of mean, sum"),
        (["SDD.NKD.FORM", "paper"], "SDD.NKD.FORM must be one of code, fixed"),
        (["SDD.DKD.T", 0], "SDD.DKD.T must be positive"),
    ):
        assert says in refusal("SDD", *words)


# CATKD


@pytest.mark.parametrize("student", ["resnet8", "vgg8", "MobileNetV2"])
def test_a_catkd_students_logits_are_the_means_of_its_maps(student):
    distiller = build("CATKD", student=student)
    net = distiller.student.eval()
    logits, features = net(batch()["image"])
    head = linear_head(net, "student")
    maps = torch.einsum("cd,ndhw->nchw", head.weight, features["final_map"])
    torch.testing.assert_close(logits, maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
    plain = network(student).eval()
    plain.load_state_dict(net.state_dict())
    assert list(plain.state_dict()) == list(net.state_dict())
    assert torch.equal(plain(batch()["image"])[0], logits)


def test_catkd_is_the_textbook_and_leaves_the_bias_at_zero():
    words = ["CATKD.BETA", 5.0, "CATKD.NORMALIZE", False]
    distiller = build("CATKD", *words, teacher="vgg8")
    image, bias = batch()["image"], distiller.student.fc.bias
    optimizer = build_optimizer(distiller.param_groups(), default_config().SOLVER)
    _, losses = distiller(**batch())
    maps = []
    for net in (distiller.student, distiller.teacher):
        fmap, weight = net(image)[1]["final_map"], net.classifier().weight
        maps.append(F.conv2d(fmap, weight[:, :, None, None]))
    student, teacher = (x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean((3, 5)) for x in maps)
    want = 5 * (student - teacher).square().mean()
    assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-4)
    sum(losses.values()).backward()
    optimizer.step()
    assert not bias.any()
    assert "fc.bias" not in dict(distiller.student.named_parameters())
    assert distiller.teacher.classifier().bias is not None


@pytest.mark.parametrize("normalize", [True, False])
def test_catkd_of_equal_maps_is_zero_and_stays(normalize):
    maps = torch.randn(4, 5, 8, 8, requires_grad=True)
    loss = catkd_loss(maps, maps.detach(), 2, normalize)
    loss.backward()
    assert loss == 0
    assert not maps.grad.any()


def test_cat_alone_has_no_cross_entropy():
    _, losses = build("CATKD", "CATKD.ONLY", True)(**batch())
    assert losses["loss_ce"] == 0
    assert losses["loss_kd"] > 0


def test_catkd_refuses_numbers_of_classes_that_do_not_exist():
    for words in (["CATKD.TOP", 11], ["CATKD.BOTTOM", -1], ["CATKD.TOP", 2, "CATKD.BOTTOM", 2]):
        assert "set one of them, to a number of classes up to 10" in refusal("CATKD", *words)
    assert "CATKD.RES must be positive" in refusal("CATKD", "CATKD.RES", 0)
    assert torch.isfinite(build("CATKD", "CATKD.TOP", 10)(**batch())[1]["loss_kd"])


# SIMKD


@pytest.mark.parametrize(
    ("student", "teacher", "side"), [("resnet8", "vgg8", 4), ("vgg8", "resnet8", 4)]
)
def test_simkd_is_the_textbook(student, teacher, side):
    """The student's larger map is pooled before the neck, the teacher's larger one after it."""
    distiller = build("SIMKD", student=student, teacher=teacher).double()
    assert not isinstance(distiller.student.classifier().weight.grad, torch.Tensor)
    image = batch()["image"].double()
    logits, losses = distiller(**batch() | {"image": image})

    plain = network(student).double().train()
    state = distiller.student.state_dict()
    head = {f"{plain.head}.weight", f"{plain.head}.bias"}
    own = {k: v for k, v in plain.state_dict().items() if k in head}
    trunk = {k: v for k, v in state.items() if k not in head and not k.startswith("neck.")}
    plain.load_state_dict({**trunk, **own})
    fmap = F.adaptive_avg_pool2d(plain(image)[1]["final_map"], side)
    neck = [p.detach().clone().requires_grad_() for p in distiller.student.neck.parameters()]
    transferred = textbook.transfer(fmap, [neck[i : i + 3] for i in (0, 3, 6)])
    with torch.no_grad():
        wanted = F.adaptive_avg_pool2d(distiller.teacher(image)[1]["final_map"], side)
    loss = (transferred - wanted).square().mean()

    assert losses["loss_kd"].item() == pytest.approx(loss.item(), rel=1e-9)
    assert losses["loss_ce"] == 0
    teachers = distiller.teacher.classifier()
    want = transferred.mean((2, 3)) @ teachers.weight.T + teachers.bias
    torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-12)
    sum(losses.values()).backward()
    loss.backward()
    for name, param in plain.named_parameters():
        if name not in head:
            got = distiller.student.get_parameter(name).grad
            torch.testing.assert_close(got, param.grad, rtol=1e-7, atol=1e-12)
    for got, param in zip(distiller.student.neck.parameters(), neck, strict=True):
        torch.testing.assert_close(got.grad, param.grad, rtol=1e-7, atol=1e-12)


def test_simkds_classifier_is_the_teachers_and_is_not_trained():
    distiller = build("SIMKD")
    head = distiller.student.classifier()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    optimizer = build_optimizer(distiller.param_groups(), default_config().SOLVER)
    learnable = [p for group in optimizer.param_groups for p in group["params"]]
    assert not {id(p) for p in head.parameters()} & {id(p) for p in learnable}
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in learnable)
    optimizer.step()
    for key, value in distiller.teacher.classifier().state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(head.state_dict()[key], value)


class Foreign(torch.nn.Module):
    """A network of nobody's zoo that keeps to the contract but takes no neck."""

    globally_pooled = True

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 10)

    def classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(x.mean((2, 3))), {"final_map": x}


def test_simkd_that_reaches_the_teachers_map_predicts_as_the_teacher():
    distiller = build("SIMKD", teacher="resnet8").eval()
    image = batch()["image"]
    logits, features = distiller.teacher(image)
    distiller.student.neck.register_forward_hook(lambda *_: features["final_map"])
    assert torch.equal(distiller(image=image), logits)
    student, teacher = distiller.run_student(image), distiller.run_teacher(image)
    assert distiller.distill(student, teacher, batch()["target"]) == 0


def test_simkd_is_refused_where_it_cannot_be():
    assert "SIMKD.FACTOR must be between 1 and 64" in refusal("SIMKD", "SIMKD.FACTOR", 65)
    student = Foreign()
    with pytest.raises(UserError, match="another head, which Foreign does not take"):
        get_distiller("SIMKD").build(student, network("resnet8"), default_config(), 50)
    with pytest.raises(UserError, match="SIMKD cannot be combined, since it gives the student"):
        build("KD+SIMKD")


@pytest.mark.parametrize(("factor", "count"), [(2, 214_016), (4, 70_400), (8, 26_240)])
def test_simkds_neck_is_as_large_as_published(factor, count):
    words = ["SIMKD.FACTOR", factor]
    nets = {"student": "resnet8x4", "teacher": "resnet8x4"}
    assert build("SIMKD", *words, **nets).get_extra_parameters() == count


# SEMCKD


def test_semckd_is_the_sum_of_its_terms():
    def term(kd, feat, size=6):
        words = ["SEMCKD.KD_WEIGHT", kd, "SEMCKD.WEIGHT", feat, "SOLVER.BATCH_SIZE", size]
        distiller = build("SEMCKD", *words)
        return distiller, distiller(**batch())[1]

    distiller, kd = term(1.0, 0.0)
    image = batch()["image"]
    want = kd_loss(distiller.student(image)[0], distiller.teacher(image)[0], 4.0)
    assert kd["loss_kd"].item() == pytest.approx(want.item(), rel=1e-4)
    _, feat = term(0.0, 400.0)
    _, both = term(1.0, 400.0)
    assert both["loss_kd"].item() == pytest.approx(
        kd["loss_kd"].item() + feat["loss_kd"].item(), rel=1e-5
    )
    assert feat["loss_kd"].item() > 0
    assert both["loss_ce"].item() > 0


@pytest.mark.parametrize("size", [2, 6, 64])
def test_semckd_takes_batches_of_any_size(size):
    """Attention networks for batches of `size` see 6 samples."""
    distiller = build("SEMCKD", "SOLVER.BATCH_SIZE", size, "SEMCKD.KD_WEIGHT", 0.0)
    _, losses = distiller(**batch())
    losses["loss_kd"].backward()
    for param in distiller.extra_parameters():
        assert torch.isfinite(param.grad).all()
    assert any(p.grad.any() for p in distiller.attention.parameters())
    assert all(p.grad.any() for p in distiller.projectors.parameters())


def test_semckds_extra_parameters_are_as_many_as_published():
    distiller = build("SEMCKD", student="resnet8x4", teacher="resnet8x4")
    assert distiller.get_extra_parameters() == 10_233_632


def test_semckd_pairs_all_stages_of_lists_of_any_length():
    distiller = build("SEMCKD", student="resnet8", teacher="BabyTeacher")
    assert len(distiller.projectors) == 3
    assert torch.isfinite(distiller(**batch())[1]["loss_kd"])
