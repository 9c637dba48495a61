"""OFA: recorded values, a plain reference, rough logits, branches of three kinds of student."""

import math

import pytest
import torch
from modern_golden import check_golden
from support import golden_values

from mdistiller.distillers import distiller_dict
from mdistiller.distillers.helpers.features.branches import ConvBranch, TokenBranch
from mdistiller.distillers.OFA import ofa_loss, resolve_eps, resolve_stages
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 5, "num_heads": 3}
SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
NETS = {
    "resnet8": {},
    "MobileNetV2": {},
    "wrn_16_1": {},
    "timm/vit_tiny_patch16_224": VIT,
    "timm/swin_tiny_patch4_window7_224": SWIN,
    "timm/mixer_s16_224": {},
}
PAIRS = [
    ("resnet8", "timm/vit_tiny_patch16_224"),
    ("MobileNetV2", "resnet8"),
    ("timm/vit_tiny_patch16_224", "resnet8"),
    ("timm/swin_tiny_patch4_window7_224", "timm/vit_tiny_patch16_224"),
    ("timm/mixer_s16_224", "resnet8"),
]


def network(name):
    torch.manual_seed(0)
    size = {"image_size": (32, 32)} if "/" in name else {}
    return get_model_entry(name, "cifar")(num_classes=10, **size, **NETS[name])


def distiller(student, teacher, *settings):
    cfg = default_config()
    cfg.merge_from_list(list(settings))
    nets = network(student), network(teacher)
    return distiller_dict["OFA"].build(*nets, cfg, 50, (32, 32)).train()


def batch(size=4):
    image = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"image": image, "target": torch.arange(size), "epoch": 1}


@pytest.mark.parametrize("case", ["ofa_eps1.0", "ofa_eps1.5"])
def test_recorded_values_of_the_code(case):
    check_golden(case, lambda t, h: ofa_loss(t["zs"], t["zt"], t["y"], h["eps"], h["temperature"]))


def test_recorded_value_of_the_paper():
    check_golden(
        "ofa_paper_gamma1.5",
        lambda t, h: ofa_loss(t["zs"], t["zt"], t["y"], h["gamma"], form="paper"),
    )


def textbook(student, teacher, target, eps, temperature, form):
    """Sample by sample in Python floats."""

    def log_softmax(row):
        row = [value / temperature for value in row]
        top = max(row)
        total = math.log(sum(math.exp(value - top) for value in row))
        return [value - top - total for value in row]

    losses = []
    for z, v, t in zip(student.tolist(), teacher.tolist(), target, strict=True):
        log_q, p = log_softmax(z), [math.exp(value) for value in log_softmax(v)]
        if form == "code":
            weights = [(1 + x) ** eps - 1 if c == t else x**eps for c, x in enumerate(p)]
        else:
            weights = [(1 + x) ** eps if c == t else x for c, x in enumerate(p)]
        losses.append(-sum(w * q for w, q in zip(weights, log_q, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("scale", [1, 100, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_in_float32_equals_the_textbook_for_large_logits(scale, temperature, form):
    student, teacher = (scale * golden_values((8, 10), seed) for seed in (1, 2))
    got = ofa_loss(student.float(), teacher.float(), torch.arange(8), 1.3, temperature, form)
    want = textbook(student, teacher, range(8), 1.3, temperature, form)
    assert got.item() == pytest.approx(want, rel=2e-5)


def test_a_tiny_target_probability_keeps_its_weight():
    """(1 + p)^eps - 1 is eps p, which rounds to 0 in float32 if computed as written."""
    teacher = torch.tensor([[0.0, 20.0]])
    student = torch.tensor([[0.0, 1e9]])
    got = ofa_loss(student, teacher, torch.tensor([0]), 1.5)
    assert got.item() == pytest.approx(1.5 * math.exp(-20) * 1e9, rel=1e-4)


def test_with_exponent_one_it_is_the_soft_cross_entropy():
    student, teacher = (5 * golden_values((8, 10), seed) for seed in (1, 2))
    want = torch.nn.functional.cross_entropy(student / 2, (teacher / 2).softmax(1))
    for target in (torch.arange(8), torch.zeros(8, dtype=torch.int64)):
        got = ofa_loss(student, teacher, target, 1.0, 2.0)
        assert got.item() == pytest.approx(want.item(), rel=1e-9)


def test_unlabelled_rows_count_neither_in_sum_nor_in_mean_and_soft_labels_by_their_largest():
    student, teacher = (5 * golden_values((4, 6), seed) for seed in (1, 2))
    some = torch.tensor([1, -100, 3, -100])
    kept = torch.tensor([0, 2])
    want = ofa_loss(student[kept], teacher[kept], some[kept], 1.5)
    assert ofa_loss(student, teacher, some, 1.5).item() == pytest.approx(want.item())
    assert ofa_loss(student, teacher, torch.full((4,), -100), 1.5) == 0
    hard = torch.tensor([1, 2, 3, 4])
    soft = 0.7 * torch.nn.functional.one_hot(hard, 6) + 0.05
    equal = ofa_loss(student, teacher, soft, 1.5) - ofa_loss(student, teacher, hard, 1.5)
    assert equal == 0


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_step_moves_student_and_branches_and_leaves_the_teacher(student, teacher):
    model = distiller(student, teacher)
    before = {key: value.clone() for key, value in model.teacher.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, losses = model(**batch())
    assert logits.shape == (4, 10)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
    extra = {id(p) for p in model.extra_parameters()}
    assert extra == {id(p) for p in model.branches.parameters()}
    after = model.teacher.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    kind = (
        TokenBranch if "vit" in student or "swin" in student or "mixer" in student else ConvBranch
    )
    assert {type(branch) for branch in model.branches} == {kind}
    assert len(model.branches) == len(model.student.get_stage_channels()) - 1


def test_the_terms_add_up_and_the_cross_entropy_is_smoothed():
    items = batch()
    weights = ["OFA.LOSS.KD_WEIGHT", 3.0, "OFA.LOSS.FEAT_WEIGHT", 0.5, "OFA.LOSS.CE_WEIGHT", 2.0]
    model = distiller("resnet8", "wrn_16_1", *weights, "OFA.EPS", [1.1, 1.2, 1.3, 1.4])
    logits, losses = model(**items)
    output, teacher = model.run_student(items["image"]), model.run_teacher(items["image"])
    stages = [
        ofa_loss(branch(feat), teacher.logits, items["target"], eps)
        for branch, feat, eps in zip(
            model.branches, output["feats"][1:], [1.1, 1.2, 1.3], strict=True
        )
    ]
    final = ofa_loss(logits, teacher.logits, items["target"], 1.4)
    want = 3.0 * final + 0.5 * sum(stages)
    assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-5)
    assert model.metrics["ofa_stages"].item() == pytest.approx(sum(stages).item(), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, items["target"])
    uniform = -logits.log_softmax(1).mean()
    want = 2.0 * (0.9 * plain + 0.1 * uniform)
    assert losses["loss_ce"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_papers_form_holds_the_cross_entropy_already():
    _, losses = distiller("resnet8", "wrn_16_1", "OFA.FORM", "paper")(**batch())
    assert losses["loss_ce"] == 0
    assert losses["loss_kd"] > 0


def test_convolutional_branches_halve_and_double_up_to_the_wider_network():
    model = distiller("resnet8", "wrn_16_1", "OFA.STAGES", [1, 3])
    first, last = model.branches
    widths = [layer.weight.shape[:2] for layer in first if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [
        *[(16, 1), (16, 16), (16, 1), (32, 16)],
        *[(32, 1), (32, 32), (32, 1), (64, 32)],
    ]
    convolutions = torch.nn.Sequential(*list(first)[:-3])
    assert convolutions(torch.zeros(2, 16, 32, 32)).shape == (2, 64, 8, 8)
    assert last[0].weight.shape == (64, 64, 1, 1)
    assert last[0].bias is not None
    wide = distiller("resnet8", "timm/mixer_s16_224").branches
    assert [branch[-1].in_features for branch in wide] == [512] * 3


def test_tokens_are_merged_to_seven_on_a_side_and_read_from_the_class_token():
    model = distiller("timm/vit_tiny_patch16_224", "resnet8")
    assert [len(branch.blocks) for branch in model.branches] == [3, 2, 1, 1]
    branch = model.branches[0].eval()
    assert len(branch.merges) == 1
    image, tokens = torch.randn(2, 24, 8, 8), torch.randn(2, 1, 24)
    assert branch.merges(image).shape == (2, 24, 4, 4)
    alone = branch(image)
    assert alone.shape == (2, 10)
    assert not torch.allclose(branch(image, tokens), branch(image, -tokens))
    torch.manual_seed(0)
    assert len(TokenBranch((1, 24, 15, 15), 2, 24, 10).merges) == 2  # 15 -> 8 -> 4
    small = TokenBranch((1, 12, 4, 4), 1, 24, 10)
    assert small(torch.randn(2, 12, 4, 4), torch.randn(2, 1, 12)).shape == (2, 10)


def test_the_class_tokens_of_each_stage_reach_its_branch():
    model = distiller("timm/vit_tiny_patch16_224", "resnet8", "OFA.STAGES", [2])
    output = model.run_student(batch()["image"])
    (found,) = model.branch_logits(output)
    want = model.branches[0](output["feats"][2], output["class_tokens"][1])
    torch.testing.assert_close(found, want)


def test_stages_and_exponents():
    assert resolve_stages([], 3) == [1, 2, 3]
    assert resolve_stages([3, 1], 4) == [3, 1]
    assert resolve_eps([1.5], 2) == [1.5] * 3
    assert resolve_eps([1.0, 1.1, 1.2], 2) == [1.0, 1.1, 1.2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["OFA.STAGES", [4]], r"OFA\.STAGES \[4\]: this student has the stages 1 to 3"),
        (["OFA.STAGES", [1, 1]], r"OFA\.STAGES \[1, 1\]"),
        (["OFA.EPS", [1.0, 1.0]], r"OFA\.EPS \[1\.0, 1\.0\] must hold one positive value, or 4"),
        (["OFA.EPS", [0.0]], r"OFA\.EPS"),
        (["OFA.EPS", []], r"OFA\.EPS"),
        (["OFA.T", 0.0], r"OFA\.T must be positive"),
        (["OFA.FORM", "coded"], r"OFA\.FORM 'coded' is not one of code, paper"),
        (["OFA.LABEL_SMOOTHING", 1.0], r"OFA\.LABEL_SMOOTHING must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        distiller("resnet8", "wrn_16_1", *settings)
