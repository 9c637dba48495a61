"""What methods derive from the networks: shapes, connectors, settings that follow from them."""

import pytest
import torch
from torch import nn

from mdistiller.distillers import distiller_dict
from mdistiller.distillers.helpers.features.connectors import ConvReg
from mdistiller.distillers.helpers.features.shapes import get_feat_shapes, probe
from mdistiller.distillers.helpers.training.settings import resolve_setting
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError


def network(name, classes=10):
    return get_model_entry(name, "cifar")(num_classes=classes)


def build(method, pair, image_size=(32, 32), num_data=40, **settings):
    teacher, student = map(network, pair.split(">"))
    cfg = default_config()
    cfg.merge_from_list([word for item in settings.items() for word in item])
    targets = torch.arange(num_data) % 10
    return distiller_dict[method].build(student, teacher, cfg, num_data, image_size, targets)


def test_the_probe_leaves_networks_and_random_numbers_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("resnet8")

        def forward(self, image):
            torch.rand(3)
            return self.net(image)

    net = Noisy().train()
    net.net.layer1.eval()
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    shapes = probe(net, (48, 40))
    assert shapes["feats"][-1] == (1, 64, 12, 10)
    assert shapes["pooled_feat"] == (1, 64)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", ["FITNET", "VID", "OFD", "CRD", "REVIEWKD"])
def test_constructors_leave_the_networks_alone(method):
    teacher, student = network("resnet8").train(), network("resnet8").eval()
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in (student, teacher)]
    distiller_dict[method].build(student, teacher, default_config(), 40)
    for net, state, mode in zip((student, teacher), states, (False, True), strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert all(module.training is mode for module in net.modules())


def test_the_probe_restores_modes_after_a_failure_and_names_what_is_absent():
    net = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        probe(net)
    assert net.training
    with pytest.raises(UserError, match="'preact_feats', which the network does not return"):
        probe(network("MobileNetV2"))["preact_feats"]


def test_feature_shapes_of_a_pair():
    student, teacher = get_feat_shapes(network("vgg8"), network("resnet8"), (32, 32))
    assert [shape[2] for shape in student] == [32, 16, 8, 4, 4]
    assert [shape[1] for shape in teacher] == [16, 16, 32, 64]


@pytest.mark.parametrize(
    ("s_size", "t_size", "kernel", "out"),
    [
        ((16, 16), (8, 8), (3, 3), (8, 8)),
        ((8, 8), (16, 16), (4, 4), (16, 16)),
        ((8, 8), (8, 8), (1, 1), (8, 8)),
        ((32, 32), (8, 8), (25, 25), (8, 8)),
        ((7, 9), (5, 9), (3, 1), (5, 9)),
        ((5, 5), (8, 8), (1, 1), (5, 5)),
        ((9, 4), (6, 6), (1, 1), (9, 4)),
    ],
)
def test_regressors_for_all_sizes(s_size, t_size, kernel, out):
    regressor = ConvReg((1, 3, *s_size), (1, 5, *t_size))
    assert regressor.conv.kernel_size == kernel
    assert regressor(torch.randn(2, 3, *s_size)).shape == (2, 5, *out)


def test_settings_are_the_found_value_or_refused():
    assert resolve_setting("A.B", 256, 256, 64) == 64
    assert resolve_setting("A.B", 64, 256, 64) == 64
    assert resolve_setting("A.B", (32, 32), [64, 64], (32, 32)) == [32, 32]
    with pytest.raises(UserError, match=r"^A\.B is 128, but these networks need 64"):
        resolve_setting("A.B", 128, 256, 64)


COUNTS = [
    ("FITNET", "resnet32x4>resnet8x4", 16768),
    ("FITNET", "resnet56>resnet20", 1120),
    ("FITNET", "vgg13>vgg8", 66304),
    ("FITNET", "resnet32x4>ShuffleV1", 983424),
    ("OFD", "resnet32x4>resnet8x4", 86912),
    ("OFD", "vgg13>vgg8", 609024),
    ("OFD", "resnet32x4>ShuffleV2", 156800),
    # The published counts of VID, and the scales that are trained here.
    ("VID", "resnet32x4>resnet8x4", 258048 + 64 + 128 + 256),
    ("REVIEWKD", "resnet32x4>resnet8x4", 1808774),
    ("CRD", "resnet32x4>resnet8x4", 2 * 128 * 257 + 5 + 256 * 40),
    ("CRD", "vgg8>MobileNetV2", 128 * (1281 + 513) + 5 + 256 * 40),
]


def test_extra_parameters():
    counts = {
        (method, pair): build(method, pair).get_extra_parameters() for method, pair, _ in COUNTS
    }
    assert counts == {(method, pair): want for method, pair, want in COUNTS}


UNLIKE = ["vgg8>resnet8", "resnet8>vgg8", "resnet8>ShuffleV1", "wrn_16_1>MobileNetV2"]


@pytest.mark.parametrize("pair", UNLIKE)
@pytest.mark.parametrize("method", ["FITNET", "VID", "OFD", "CRD", "REVIEWKD"])
def test_unlike_networks_take_a_step_from_the_defaults(method, pair):
    distiller = build(method, pair).train()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 14])
    _, losses = distiller(image=image, target=index % 10, index=index, epoch=1)
    sum(losses.values()).backward()
    assert torch.isfinite(losses["loss_kd"])
    for parameter in distiller.get_learnable_parameters():
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    ("method", "pair", "settings", "message"),
    [
        ("CRD", "resnet8>resnet8", {"CRD.FEAT.STUDENT_DIM": 100}, "STUDENT_DIM is 100.* need 64"),
        ("CRD", "resnet8>resnet8", {"CRD.MODE": "other"}, "CRD.MODE must be exact or relax"),
        ("CRD", "resnet8>resnet8", {"CRD.NCE.TEMPERATURE": 0.001}, "TEMPERATURE must be at least"),
        ("CRD", "resnet8>resnet8", {"CRD.NCE.MOMENTUM": 1.5}, "MOMENTUM must be within"),
        (
            "REVIEWKD",
            "resnet8>resnet8",
            {"REVIEWKD.IN_CHANNELS": [16, 32, 64]},
            r"IN_CHANNELS is \[16, 32, 64\], but these networks need \[16, 32, 64, 64\]",
        ),
        (
            "REVIEWKD",
            "resnet8>resnet8",
            {"REVIEWKD.SHAPES": [1, 7, 14, 28]},
            r"SHAPES is \[1, 7, 14, 28\], but these networks need \[1, 8, 16, 32\]",
        ),
        ("REVIEWKD", "vgg8>MobileNetV2", {"REVIEWKD.STU_PREACT": True}, "leave it at False"),
        ("OFD", "MobileNetV2>resnet8", {}, "preact_feats|batch norm"),
        ("OFD", "resnet8>resnet8", {"OFD.CONNECTOR.KERNEL_SIZE": 0}, "KERNEL_SIZE must be at"),
        ("FITNET", "resnet8>vgg8", {"FITNET.HINT_LAYER": 4}, "must be one of 0 to 3"),
        ("FITNET", "resnet8>resnet8", {"FITNET.INPUT_SIZE": (64, 64)}, "INPUT_SIZE is"),
        ("VID", "resnet8>resnet8", {"VID.INIT_PRED_VAR": 1e-6}, "must be above VID.EPS"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(method, pair, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build(method, pair, **settings)
    assert "\n" not in str(caught.value)


def test_right_settings_are_accepted():
    lists = {"IN_CHANNELS": [16, 32, 64, 64], "OUT_CHANNELS": [32, 64, 128, 128]}
    settings = {f"REVIEWKD.{key}": value for key, value in lists.items()}
    build("REVIEWKD", "wrn_16_2>resnet8", **settings)
    build("CRD", "wrn_16_2>resnet8", **{"CRD.FEAT.STUDENT_DIM": 64, "CRD.FEAT.TEACHER_DIM": 128})


def test_the_default_hint_of_a_shallow_network_is_its_last_layer():
    with pytest.warns(UserWarning, match="no layer 2; the hint is layer 1"):
        distiller = build("FITNET", "resnet8>BabyStudent")
    assert distiller.hint_layer == 1
    with pytest.raises(UserError, match="must be one of 0 to 1"):
        build("FITNET", "resnet8>BabyStudent", **{"FITNET.HINT_LAYER": 3})


def test_ofd_pairs_margins_with_the_deepest_stages():
    distiller = build("OFD", "vgg8>resnet8")  # a teacher of four stages, a student of three
    norms = distiller.teacher.get_bn_before_relu()[-3:]
    widths = [distiller.get_buffer(f"margin{i}").shape[1] for i in range(3)]
    assert widths == [len(norm.weight) for norm in norms] == [256, 512, 512]


def test_ofd_lets_the_teachers_statistics_move_in_training_only():
    distiller = build("OFD", "resnet8>resnet8").train()
    assert distiller.teacher.training
    before = distiller.teacher.bn1.running_mean.clone()
    batch = {"image": torch.randn(4, 3, 32, 32), "target": torch.arange(4), "epoch": 1}
    distiller(**batch)
    assert not torch.equal(distiller.teacher.bn1.running_mean, before)
    assert not distiller.eval().teacher.training


def test_vid_trains_its_scales_from_the_given_variance():
    distiller = build("VID", "resnet8>resnet8", **{"VID.INIT_PRED_VAR": 2.0})
    for scale in distiller.log_scales:
        variance = nn.functional.softplus(scale) + 1e-5
        torch.testing.assert_close(variance, torch.full_like(variance, 2.0))
    learnable = {id(p) for p in distiller.get_learnable_parameters()}
    assert learnable >= {id(scale) for scale in distiller.log_scales}
    assert sum(key.startswith("log_scales") for key in distiller.state_dict()) == 3


def test_reviewkd_takes_the_stages_of_a_teacher_without_preactivations():
    class Feats(nn.Module):
        """A network that returns no preact_feats, or its outputs under that name."""

        def __init__(self, named):
            super().__init__()
            torch.manual_seed(1)
            self.net, self.named = network("resnet8").eval(), named

        def forward(self, image):
            logits, features = self.net(image)
            kept = {key: features[key] for key in ("feats", "pooled_feat")}
            return logits, kept | ({"preact_feats": kept["feats"]} if self.named else {})

    losses = []
    for named in (False, True):
        teacher = Feats(named)
        torch.manual_seed(0)
        distiller = distiller_dict["REVIEWKD"].build(
            network("vgg8"), teacher, default_config(), 40, (32, 32)
        )
        image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        _, terms = distiller.train()(image=image, target=torch.arange(4), epoch=1)
        losses.append(terms["loss_kd"].item())
    assert losses[0] == losses[1] > 0
