"""Initialisation stages: what they train, in which modes, and what cannot have one."""

import warnings

import pytest
import torch
from test_distillers import batch
from torch import nn

from mdistiller.distillers import DISTILLERS, Distiller, get_distiller
from mdistiller.distillers.helpers.training.init_stage import InitPlan, stage_modules
from mdistiller.engine.cfg import default_config
from mdistiller.engine.stages import running
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

TWO_STAGE = ["AB", "FSP", "FT"]


def network(name="resnet8"):
    return get_model_entry(name, "cifar")(num_classes=10)


def build(method, pair="resnet8>resnet8", **settings):
    torch.manual_seed(0)
    teacher, student = map(network, pair.split(">"))
    cfg = default_config()
    cfg.merge_from_list([word for item in settings.items() for word in item])
    distiller = get_distiller(method).build(student, teacher, cfg, 50, image_size=(32, 32))
    distiller.teacher.requires_grad_(False)
    return distiller.train()


def names(net, stage=-1):
    known = {module: name for name, module in net.named_modules()}
    return [known[module] for module in stage_modules(net, stage)]


@pytest.mark.parametrize(
    ("model", "want"),
    [
        ("resnet20", ["conv1", "bn1", "layer1", "layer2", "layer3"]),
        ("ResNet18", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg8", ["block0", "block1", "block2", "block3", "block4"]),
        ("wrn_16_1", ["conv1", "block1", "block2", "block3"]),
        ("MobileNetV2", ["conv1", "blocks"]),
        ("ShuffleV1", ["conv1", "bn1", "layer1", "layer2", "layer3"]),
        ("ShuffleV2", ["conv1", "bn1", "layer1", "layer2", "layer3"]),
    ],
)
def test_feature_modules_are_those_of_repdistiller(model, want):
    assert names(network(model)) == want


def test_modules_of_the_first_stages():
    assert names(network("resnet8"), 2) == ["conv1", "bn1", "layer1", "layer2"]
    assert names(network("resnet8"), 0) == ["conv1", "bn1"]
    mobile = names(network("MobileNetV2"), 2)
    assert mobile == ["conv1", "blocks.0", "blocks.1", "blocks.2"]


def test_finding_modules_leaves_the_network_alone():
    net = network().train()
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        assert stage_modules(net, -1)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


TRAINED = {
    "FSP": {"student.conv1", "student.block1", "student.block2", "student.block3"},
    "AB": {"student.conv1", "student.block1", "student.block2", "student.block3", "connectors"},
    "FT": {"paraphraser"},
}


@pytest.mark.parametrize("method", TWO_STAGE)
def test_a_stage_trains_its_modules_and_nothing_else(method):
    """WRN: the last batch norm is none of a stage's modules, though pre-activations pass it."""
    distiller = build(method, "wrn_16_1>wrn_16_1" if method == "FSP" else "wrn_16_2>wrn_16_1")
    modes = {name: module.training for name, module in distiller.named_modules()}
    wanted = [p.requires_grad for p in distiller.parameters()]
    with running(distiller, "init") as groups:
        distiller.train()
        _, losses = distiller(**batch())
        assert set(losses) == {"loss_init"}
        losses["loss_init"].backward()
        inside = {
            name
            for name, _ in distiller.named_modules()
            if any(name == top or name.startswith(f"{top}.") for top in TRAINED[method])
        }
        for name, module in distiller.named_modules():
            assert module.training is (name in inside or name == ""), name
        with_gradient = {
            name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()
        }
        ours = {
            name for name, _ in distiller.named_parameters() if name.rpartition(".")[0] in inside
        }
        assert with_gradient <= ours
        assert {name.split(".")[0] for name in with_gradient} == {
            t.split(".")[0] for t in TRAINED[method]
        }
        trainable = {name for name, p in distiller.named_parameters() if p.requires_grad}
        assert trainable == ours
        assert {id(p) for group in groups for p in group["params"]} == {
            id(p) for name, p in distiller.named_parameters() if name in ours
        }
        assert not distiller.eval().student.training
        assert torch.equal(
            distiller(image=batch()["image"]), distiller.student(batch()["image"])[0]
        )
    distiller.train()
    assert {name: module.training for name, module in distiller.named_modules()} == modes
    assert [p.requires_grad for p in distiller.parameters()] == wanted
    assert all(p.grad is None for p in distiller.parameters())
    assert set(distiller(**batch())[1]) == {"loss_ce", "loss_kd"}


@pytest.mark.parametrize("pair", ["vgg8>resnet8", "resnet8>vgg8", "vgg8>MobileNetV2"])
def test_ab_uses_every_parameter_it_trains(pair):
    """Several processes need that; a student's stages without partner are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        distiller = build("AB", pair)
    with running(distiller, "init") as groups:
        distiller.train()
        distiller(**batch())[1]["loss_init"].backward()
        assert all(p.grad is not None for group in groups for p in group["params"])
    if pair == "resnet8>vgg8":
        assert not {id(p) for p in distiller.student.block4.parameters()} & {
            id(p) for group in groups for p in group["params"]
        }


def test_ab_says_which_stages_have_no_partner():
    with pytest.warns(UserWarning, match="left over, without part in the loss: student stage 4"):
        build("AB", "resnet8>vgg8")


def test_ab_needs_no_connector_between_equal_shapes_and_no_relu():
    assert all(isinstance(c, nn.Identity) for c in build("AB").connectors)
    connectors = build("AB", "wrn_16_2>resnet8").connectors
    assert [type(c.conv) for c in connectors] == [nn.Conv2d] * 3
    assert not any(c.use_relu for c in connectors)
    halved = build("AB", "ResNet50>vgg8").connectors
    assert [type(c.conv) for c in halved] == [nn.ConvTranspose2d] * 3 + [nn.Conv2d]


@pytest.mark.filterwarnings("ignore:.*left over, without part:UserWarning")
def test_ab_takes_pre_activations_where_there_are_any():
    assert build("AB", "resnet8>MobileNetV2").keys == ["feats", "preact_feats"]
    assert build("AB", "MobileNetV2>resnet8").keys == ["preact_feats", "feats"]


@pytest.mark.parametrize("method", ["AB", "FSP"])
def test_after_two_stages_the_main_one_is_cross_entropy_alone(method):
    distiller = build(method, "resnet8>resnet8")
    distiller.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    logits, losses = distiller(**batch())
    plain = nn.functional.cross_entropy(logits, batch()["target"])
    assert losses["loss_ce"].item() == pytest.approx(plain.item())
    assert losses["loss_kd"] == 0
    assert distiller.extra_parameters() == []


@pytest.mark.parametrize("method", TWO_STAGE)
def test_one_stage_is_chosen_by_config(method):
    settings = {f"{method}.INIT.EPOCHS": 0, f"{method}.LOSS.FEAT_WEIGHT": 3.0}
    distiller = build(method, "resnet8>resnet8", **settings)
    assert distiller.init_stages() == {}
    _, losses = distiller(**batch())
    _, double = build(method, **(settings | {f"{method}.LOSS.FEAT_WEIGHT": 6.0}))(**batch())
    assert losses["loss_kd"].item() > 0
    assert double["loss_kd"].item() == pytest.approx(2 * losses["loss_kd"].item(), rel=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())


def test_connectors_of_ab_are_trained_in_one_stage():
    settings = {"AB.INIT.EPOCHS": 0, "AB.LOSS.FEAT_WEIGHT": 1.0}
    distiller = build("AB", "wrn_16_2>resnet8", **settings)
    assert distiller.extra_parameters() == list(distiller.connectors.parameters())
    distiller(**batch())[1]["loss_kd"].backward()
    assert all(p.grad is not None for p in distiller.connectors.parameters())


def test_weights_of_both_stages():
    for method in ("AB", "FSP"):
        plain, heavy = build(method), build(method, **{f"{method}.INIT.WEIGHT": 10.0})
        losses = []
        for distiller in (plain, heavy):
            with running(distiller, "init"):
                losses.append(distiller.train()(**batch())[1]["loss_init"].item())
        assert losses[1] == pytest.approx(10 * losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("norms", "counts"), [("translator", (0, 3)), ("both", (6, 3)), ("none", (0, 0))]
)
def test_ft_has_its_networks(norms, counts):
    distiller = build("FT", "wrn_16_2>resnet8", **{"FT.BATCH_NORM": norms})
    parts = distiller.paraphraser, distiller.translator
    assert tuple(sum(isinstance(m, nn.BatchNorm2d) for m in p.modules()) for p in parts) == counts
    kernels = [
        [tuple(m.weight.shape[:2]) for m in p if hasattr(m, "kernel_size")]
        for p in (
            distiller.paraphraser.encoder,
            distiller.paraphraser.decoder,
            distiller.translator,
        )
    ]
    assert kernels[0] == [(128, 128), (64, 128), (64, 64)]
    assert kernels[1] == [(64, 64), (64, 128), (128, 128)]  # transposed: (in, out)
    assert kernels[2] == [(64, 64), (64, 64), (64, 64)]
    learnable = {id(p) for p in distiller.get_learnable_parameters()}
    assert learnable.isdisjoint(map(id, distiller.paraphraser.parameters()))
    assert learnable >= {id(p) for p in distiller.translator.parameters()}
    assert not distiller.paraphraser.training
    assert distiller.translator.training
    distiller(**batch())[1]["loss_kd"].backward()
    assert all(p.grad is None for p in distiller.paraphraser.parameters())
    assert distiller.student.conv1.weight.grad.any()


def test_parts_of_a_sum_have_their_stages_in_turn():
    distiller = build("KD+FT+AB")
    assert list(distiller.init_stages()) == ["init-FT", "init-AB"]
    parts = distiller.parts
    with running(distiller, "init-FT"):
        distiller.train()
        assert parts["FT"].paraphraser.training
        assert not distiller.student.training
        _, ft = distiller(**batch())
    with running(distiller, "init-AB"):
        distiller.train()
        assert not parts["FT"].paraphraser.encoder.training
        assert distiller.student.layer1.training
        assert not distiller.teacher.training
        _, ab = distiller(**batch())
    assert set(ft) == set(ab) == {"loss_init"}
    alone = build("AB")
    alone.student.load_state_dict(distiller.student.state_dict())
    alone.teacher.load_state_dict(distiller.teacher.state_dict())
    with running(alone, "init"):
        assert alone.train()(**batch())[1]["loss_init"].item() == pytest.approx(
            ab["loss_init"].item()
        )
    _, main = distiller.train()(**batch())
    assert {"loss_KD", "loss_FT"} <= set(distiller.metrics)
    assert "loss_AB" not in distiller.metrics  # its transfer was the first stage
    assert main["loss_kd"].item() == pytest.approx(
        sum(distiller.metrics[f"loss_{name}"].item() for name in ("KD", "FT")), rel=1e-6
    )


def test_a_part_that_wants_the_teacher_in_train_mode_waits_for_the_main_stage():
    distiller = build("OFD+FSP")
    with running(distiller, "init-FSP"):
        assert not distiller.train().teacher.training
    assert distiller.train().teacher.training


@pytest.mark.parametrize(
    ("method", "pair", "settings", "message"),
    [
        ("FSP", "vgg8>resnet8", {}, r"equal widths; the student has \[16, 16, 32, 64\]"),
        ("FSP", "wrn_16_2>wrn_16_1", {}, "equal widths"),
        ("FSP", "resnet8>resnet8", {"FSP.FORM": "mine"}, "FSP.FORM 'mine' is not one of sum, mean"),
        ("AB", "resnet8>resnet8", {"AB.FORM": "mine"}, "AB.FORM 'mine' is not one of sum, mean"),
        ("AB", "resnet8>resnet8", {"AB.MARGIN": 0}, "AB.MARGIN must be positive"),
        ("AT", "resnet8>resnet8", {"AT.FORM": "mine"}, "AT.FORM 'mine' is not one of sum, mean"),
        ("FT", "resnet8>resnet8", {"FT.FORM": "mine"}, "FT.FORM 'mine' is not one of attention"),
        ("FT", "resnet8>resnet8", {"FT.RATE": 0.001}, "FT.RATE 0.001 leaves no factor"),
        ("FT", "resnet8>resnet8", {"FT.P": 0}, "FT.P must be at least 1"),
        ("FT", "resnet8>resnet8", {"FT.INIT.EPOCHS": -1}, "FT.INIT.EPOCHS must be at least 0"),
        ("FSP", "resnet8>resnet8", {"FSP.INIT.LR": -0.1}, "FSP.INIT.LR must be at least 0"),
        ("FSP", "resnet8>resnet8", {"FSP.INIT.EPOCHS": 0}, "leave FSP without effect"),
        ("AB", "resnet8>resnet8", {"AB.INIT.EPOCHS": 0}, "leave AB without effect"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_reason(method, pair, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build(method, pair, **settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def incomplete():
    class Incomplete(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.init = InitPlan(1, 0.1, [], 0.1)

    DISTILLERS["Incomplete"] = Incomplete
    yield "Incomplete"
    del DISTILLERS["Incomplete"]


def test_a_method_with_a_plan_must_say_what_it_trains(incomplete):
    distiller = build(incomplete)
    with (
        pytest.raises(TypeError, match=r"must override init_modules\(\)"),
        running(distiller, "init"),
    ):
        pass
    distiller.init_modules = lambda: [distiller.student]
    with running(distiller, "init"), pytest.raises(TypeError, match=r"must override init_loss"):
        distiller.train()(**batch())
    assert distiller.init_stage == ""
