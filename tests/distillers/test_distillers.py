"""The Distiller contract: what every registered method keeps to."""

import contextlib

import pytest
import torch
from torch import nn

from mdistiller.distillers import Distiller, Vanilla, distiller_dict, get_distiller
from mdistiller.distillers.helpers.losses.numerics import cross_entropy
from mdistiller.distillers.helpers.training.settings import warmup_factor
from mdistiller.engine.cfg import default_config
from mdistiller.engine.stages import running
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

METHODS = sorted(distiller_dict)


def networks(classes=10):
    torch.manual_seed(0)
    entry = get_model_entry("resnet8", "cifar")
    return entry(num_classes=classes), entry(num_classes=classes)


def build(method, classes=10):
    student, teacher = networks(classes)
    return distiller_dict[method].build(
        student,
        teacher,
        default_config(),
        num_data=50,
        image_size=(32, 32),
        targets=torch.arange(50) % classes,
    )


def batch(size=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(size, 3, 32, 32, generator=generator),
        "target": torch.arange(size) % 10,
        "index": torch.arange(size),
        "epoch": 2,
    }


def items(distiller, epoch=2):
    """A training batch as the method wants it."""
    given = batch() | {"epoch": epoch}
    if distiller.two_views:
        given["image"] = given["image"], given["image"].flip(3)
    return given


def stage(distiller):
    """The stage whose loss reaches the student: the main one but where that is cross-entropy."""
    return contextlib.nullcontext() if distiller.distills else running(distiller, "init")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bf16_trains_what_is_learnable_and_leaves_the_teacher(method):
    distiller = build(method).train()
    teacher = distiller.teacher
    before = {} if teacher is None else {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, losses = distiller(**items(distiller))
    assert logits.shape == (6, 10)
    assert set(losses) == ({"loss_ce"} if method == "NONE" else {"loss_ce", "loss_kd"})
    total = sum(losses.values())
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    total.backward()
    learnable = {id(p) for p in distiller.get_learnable_parameters()}
    for name, param in distiller.named_parameters():
        if id(param) in learnable:
            assert param.grad is not None, name
            assert torch.isfinite(param.grad).all(), name
        else:  # a part that the method keeps as it is
            assert name.startswith("teacher.") or not param.requires_grad, name
    if teacher is not None:
        assert all(p.grad is None for p in teacher.parameters())
        after = teacher.state_dict()
        if not distiller.teacher_in_eval_mode:  # running statistics move, parameters do not
            before = {key: before[key] for key, _ in teacher.named_parameters()}
        assert all(torch.equal(before[key], after[key]) for key in before)
    distiller.eval()
    image = batch()["image"]
    assert torch.equal(distiller(image=image), distiller.student(image)[0])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "NONE"])
def test_the_distillation_term_alone_reaches_the_students_stem_and_not_the_teacher(method):
    """Where it is a stage of its own (AB, FSP), what that stage minimises."""
    distiller = build(method).train()
    with stage(distiller):
        _, losses = distiller.train()(**items(distiller))
        losses["loss_kd" if distiller.distills else "loss_init"].backward()
        gradient = distiller.student.conv1.weight.grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        if distiller.teacher is not None:
            assert all(p.grad is None for p in distiller.teacher.parameters())


ROUGH = {
    "zeros": lambda x: 0 * x,
    "equal rows": lambda x: x[:1].expand_as(x),
    "large, one class sure": lambda x: 1e4 * torch.cat([x[:, :1] + 1, x[:, 1:] - 1], dim=1),
}


def roughen(net, change):
    """Have `net` return `change` of its logits and of every feature."""

    def everywhere(value):
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            return {name: everywhere(item) for name, item in value.items()}
        return type(value)(everywhere(item) for item in value)

    return net.register_forward_hook(lambda module, args, output: everywhere(output))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bf16_on_degenerate_outputs_of_both_networks_stays_finite(method):
    """Connectors, losses, and the backward pass into the student, in all stages of the method."""
    distiller, bad = build(method).train(), []
    for kind, change in ROUGH.items():
        nets = filter(None, (distiller.student, distiller.teacher))
        hooks = [roughen(net, change) for net in nets]
        for name in ["", *distiller.init_stages()]:
            distiller.zero_grad()
            with running(distiller, name) if name else contextlib.nullcontext():
                distiller.train()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    _, losses = distiller(**items(distiller, epoch=30))  # warm-ups are over
                sum(losses.values()).backward()
            tensors = {
                **losses,
                **{key: p.grad for key, p in distiller.named_parameters() if p.grad is not None},
                **dict(distiller.named_buffers()),
            }
            bad += [(kind, name, key) for key, x in tensors.items() if not x.isfinite().all()]
        for hook in hooks:
            hook.remove()
    assert bad == []


# With the teacher's own outputs these have a gradient all the same, by their formulas.
NOT_AT_REST = {
    "DIST": "its 1e-8 is not small beside what the logits of untrained networks vary over a batch",
    "NKD": "the target's term is a cross-entropy with weight p_t",
    "RLD": "the student's confidence in the label follows the teacher's in its guess",
    "CRLD": "the two views teach each other",
    "CORRECTEDKD": "the label corrects the teacher",
    "TTM": "the student at temperature 1 is to match a softened teacher",
    "WKD": "the target's term is a cross-entropy with weight p_t",
    "WTTM": "the student at temperature 1 is to match a softened teacher",
}


def test_a_student_that_equals_its_teacher_is_left_alone():
    """Not so where new layers lie between the networks: they start anywhere."""
    tried, wrong = [], []
    for method in METHODS:
        distiller = build(method).train()
        new_layers = len(distiller.student.state_dict()) > len(networks()[0].state_dict())
        if distiller.teacher is None or distiller.extra_parameters() or new_layers:
            continue
        if not distiller.distills:
            continue
        tried.append(method)
        distiller.student.load_state_dict(distiller.teacher.state_dict())
        distiller.student.eval()
        distiller.teacher.eval()
        outputs = {}
        distiller.student.register_forward_hook(
            lambda m, a, output, outputs=outputs: outputs.update(out=output)
        )
        _, losses = distiller(**items(distiller, epoch=30))
        logits, features = outputs["out"]
        tensors = [logits, *features["feats"], features["pooled_feat"]]
        grads = torch.autograd.grad(losses["loss_kd"], tensors, allow_unused=True)
        largest = max(g.abs().max().item() for g in grads if g is not None)
        if (largest > 1e-4) != (method in NOT_AT_REST):
            wrong.append((method, largest))
    assert wrong == []
    assert set(NOT_AT_REST) < set(tried)
    assert {"KD", "DKD", "AT", "SP", "RKD"} < set(tried)


def test_train_keeps_the_teacher_in_eval_mode_and_wants_a_bool():
    distiller = build("KD").train()
    assert distiller.student.training
    assert not distiller.teacher.training
    with pytest.raises(ValueError, match="bool"):
        distiller.train("yes")


def test_weights_and_warm_up_scale_the_terms():
    cfg = default_config()
    cfg.merge_from_list(["DKD.CE_WEIGHT", 0.25, "DKD.WARMUP", 20, "KD.LOSS.KD_WEIGHT", 3])

    def losses(method, epoch, config):
        distiller = distiller_dict[method].build(*networks(), config, 50).train()
        return distiller(**{**batch(), "epoch": epoch})[1]

    early, late, later = (losses("DKD", epoch, cfg) for epoch in (1, 20, 200))
    assert early["loss_kd"].item() == pytest.approx(late["loss_kd"].item() / 20, rel=1e-5)
    assert late["loss_kd"].item() == later["loss_kd"].item()
    plain = losses("DKD", 1, default_config())
    assert early["loss_ce"].item() == pytest.approx(0.25 * plain["loss_ce"].item(), rel=1e-6)
    kd, kd3 = losses("KD", 1, default_config()), losses("KD", 1, cfg)
    assert kd3["loss_kd"].item() == pytest.approx(kd["loss_kd"].item() * 3 / 0.9, rel=1e-5)


def test_warm_up_of_nothing_is_full_weight():
    assert warmup_factor(1, 0) == 1.0
    assert warmup_factor(5, 20) == 0.25


def test_dkd_keeps_its_terms_as_metrics_outside_the_loss():
    distiller = build("DKD").train()
    _, losses = distiller(**{**batch(), "epoch": 20})
    metrics = distiller.metrics
    assert losses["loss_kd"].item() == pytest.approx(
        (metrics["tckd"] + 8 * metrics["nckd"]).item(), rel=1e-6
    )
    assert not metrics["tckd"].requires_grad


def test_temperature_must_be_positive():
    cfg = default_config()
    cfg.merge_from_list(["KD.TEMPERATURE", 0])
    with pytest.raises(UserError, match=r"KD\.TEMPERATURE must be positive"):
        distiller_dict["KD"].build(*networks(), cfg, 50)


class WithExtras(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.connector = nn.Linear(4, 3)

    def distill(self, student, teacher, target, **batch):
        return self.connector.weight.sum() + 0 * student["pooled_feat"].sum()


def test_children_are_found_as_learnable_and_counted():
    distiller = WithExtras(*networks(), None)
    learnable = distiller.get_learnable_parameters()
    students = list(distiller.student.parameters())
    assert [id(p) for p in learnable] == [
        *map(id, students),
        id(distiller.connector.weight),
        id(distiller.connector.bias),
    ]
    assert distiller.get_extra_parameters() == 15
    assert distiller.module is distiller


def test_a_missing_feature_is_named():
    class Wants(WithExtras):
        def distill(self, student, teacher, target, **batch):
            return student["nonsense"]

    with pytest.raises(UserError, match="needs 'nonsense', which the network does not return"):
        Wants(*networks(), None).train()(**batch())


def test_vanilla_takes_only_a_network():
    net = networks()[0]
    assert Vanilla(net).student is net


def test_cross_entropy_without_labels_is_zero_and_takes_soft_targets():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    unlabelled = cross_entropy(logits, torch.full((4,), -100))
    unlabelled.backward()
    assert unlabelled == 0
    assert not logits.grad.any()
    some = cross_entropy(logits, torch.tensor([0, -100, 2, -100]))
    assert some.item() == pytest.approx(cross_entropy(logits[::2], torch.tensor([0, 2])).item())
    hard = torch.tensor([0, 1, 2, 1])
    soft = nn.functional.one_hot(hard, 3).float()
    assert cross_entropy(logits, hard).item() == pytest.approx(cross_entropy(logits, soft).item())


def test_forward_train_gets_the_arguments_it_names():
    class Strict(Distiller):
        def forward_train(self, image, target, epoch):
            logits = self.student(image)[0]
            return logits, {"loss_ce": cross_entropy(logits, target) * epoch}

    _, losses = Strict(*networks()).train()(**batch())
    assert set(losses) == {"loss_ce"}


def test_a_config_key_that_is_not_set_is_named():
    class Reads(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.weight = cfg.NOTHING.WEIGHT

    with pytest.raises(UserError, match="Reads reads the config key NOTHING, which is not set"):
        Reads.build(*networks(), default_config(), 50)


@pytest.mark.parametrize("method", [m for m in METHODS if distiller_dict[m].uses_teacher])
def test_a_method_says_truly_which_outputs_of_the_teacher_it_reads(method):
    """With them alone the same losses, or else an error."""
    distiller, again = build(method).train(), build(method).train()
    given, read = items(distiller), distiller.cacheable_outputs()
    runs_it_plainly = distiller.distills and distiller.teacher_in_eval_mode
    if distiller.two_views or not runs_it_plainly:
        assert not read
        return
    output = distiller.run_teacher(given["image"])
    features = {"pooled_feat": output["pooled_feat"]} if read != ("logits",) else {}
    logits = output.logits if read != ("pooled_feat",) else output.logits[:, :0]
    cached = {"teacher_logits": logits, "teacher_features": features}
    if not read:
        with pytest.raises((UserError, KeyError)):
            distiller(**given, **cached)
        return
    again.run_teacher = None
    torch.manual_seed(0)  # of CRD's negatives
    losses = distiller(**given)[1]
    torch.manual_seed(0)
    others = again(**given, **cached)[1]
    for name, loss in losses.items():
        assert torch.equal(loss, others[name])


def test_a_class_that_reads_the_teacher_in_its_own_way_has_to_say_how_much():
    class Same(distiller_dict["KD"]):
        pass

    class Other(distiller_dict["KD"]):
        def distill(self, student, teacher, target, **batch):
            return student.logits.mean()

    class Sure(Other):
        teacher_logits_only = True

    class Twice(distiller_dict["KD"]):
        def forward_train(self, image, target, **batch):
            return super().forward_train(image.flip(3), target, **batch)

    class Cropped(distiller_dict["KD"]):
        def run_teacher(self, image):
            return super().run_teacher(image[..., 1:, 1:])

    found = [cls.cacheable_outputs() for cls in (Same, Other, Sure, Twice, Cropped)]
    assert found == [("logits",), (), ("logits",), (), ()]


def test_a_sum_reads_of_the_teacher_what_its_parts_do():
    sums = {"KD+DIST": ("logits",), "KD+RKD": ("logits", "pooled_feat"), "KD+AT": ()}
    assert {name: get_distiller(name).cacheable_outputs() for name in sums} == sums
