"""Students under teachers, one or two steps of small networks."""

import copy
import re

import pytest
import torch
from nets import detector, images, node, targets
from support import same_state

from mdistiller.detection.config import load_config
from mdistiller.detection.distillers import DetectionDistiller
from mdistiller.detection.methods import METHODS
from mdistiller.detection.networks.backbones import with_frozen_norms
from mdistiller.detection.run import build_distiller
from mdistiller.registry import UserError

EVERY = "+".join(METHODS)
LOSSES = {name: METHODS[name].loss for name in METHODS}


def join(kind, student=None, teacher=None, *words):
    student = detector() if student is None else student
    teacher = detector(seed=1) if teacher is None else teacher
    cfg = load_config("", ["DISTILLER.TYPE", kind, *words])
    return DetectionDistiller(student, None if kind == "NONE" else teacher, cfg).train()


def step(distiller, masks=False, seed=0):
    """The terms of a step; the second image has no object."""
    torch.manual_seed(seed)  # regions are sampled
    return distiller(images=images(), targets=targets(masks))[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_all_there_is_to_train(name):
    distiller = join(name)
    losses = step(distiller)
    own = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert set(losses) == own | {LOSSES[name]}
    sum(losses.values()).backward()
    for key, parameter in distiller.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    losses = step(distiller)
    losses[LOSSES[name]].backward()
    assert next(distiller.student.backbone.body.parameters()).grad.norm() > 0


def test_the_teacher_stays_as_it_is():
    distiller = join(EVERY)
    teacher = distiller.guide
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.param_groups(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for seed in range(2):
        distiller.eval()
        distiller.train()
        optimizer.zero_grad()
        sum(step(distiller, seed=seed).values()).backward()
        optimizer.step()
    assert same_state(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert theirs.isdisjoint(map(id, distiller.parameters()))
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "methods"}


def twin(net):
    """A student and a teacher that are the same, with constant norms."""
    net = with_frozen_norms(net)
    return net, copy.deepcopy(net)


@pytest.mark.parametrize("flavour", ["tv", "d2"])
def test_both_networks_judge_the_same_regions(flavour):
    """A teacher that equals the student has nothing to tell."""
    losses = step(join("KD+DKD", *twin(detector(FLAVOUR=flavour))))
    assert losses["loss_dkd"].abs() < 1e-9
    assert losses["loss_kd"].abs() < 1e-9
    other = step(join("DKD", with_frozen_norms(detector(FLAVOUR=flavour))))
    assert other["loss_dkd"] > 1e-3


def test_each_network_sees_the_images_its_own_way():
    """The same network for BGR images in grey levels, taught from RGB ones: nothing to tell."""
    student, _ = twin(detector())
    teacher = with_frozen_norms(detector(INPUT="bgr"))
    state = student.state_dict()
    spread = student.transform.std.view(1, 3, 1, 1) * 255
    stem = next(key for key in state if key.startswith("backbone.body."))
    state[stem] = (state[stem] / spread).flip(1)
    teacher.load_state_dict(state)
    losses = step(join("DKD", student, teacher))
    assert losses["loss_dkd"].abs() < 1e-6
    teacher.transform = student.transform
    assert step(join("DKD", student, teacher))["loss_dkd"] > 1e-4


def test_without_a_teacher_it_is_the_detector():
    student = detector()
    distiller = join("NONE", student)
    assert distiller.guide is None
    losses = step(distiller)
    torch.manual_seed(0)
    for name, value in student(images(), targets()).items():
        assert torch.equal(losses[name], value), name


def test_a_mask_student_under_review():
    losses = step(join("REVIEWKD", detector(MASK=True), detector(MASK=True, seed=1)), masks=True)
    assert losses["loss_mask"] > 0
    assert losses["loss_review"].isfinite()


def test_a_step_in_bf16():
    distiller = join(EVERY)
    full = step(distiller)
    with torch.autocast("cpu", torch.bfloat16):
        low = step(distiller)
    assert all(value.dtype == torch.float32 for value in low.values())
    for name in ("loss_objectness", "loss_review", "loss_fitnet"):
        assert low[name].item() == pytest.approx(full[name].item(), rel=0.05), name
    sum(low.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.parameters())


def test_norms_have_a_weight_decay_of_their_own():
    distiller = join("REVIEWKD", None, None, "SOLVER.WEIGHT_DECAY_NORM", "0.5")
    rest, norms = distiller.param_groups()
    assert "weight_decay" not in rest
    assert norms["weight_decay"] == 0.5
    assert any(p is distiller.methods["REVIEWKD"].abfs[0].conv1[1].weight for p in norms["params"])
    bias = distiller.student.roi_heads.box_predictor.cls_score.bias
    assert any(p is bias for p in rest["params"])  # as detectron2 has it
    assert len(rest["params"]) + len(norms["params"]) == len(list(distiller.parameters()))


def test_other_classes_are_refused_where_logits_are_compared():
    other = detector(num_classes=5, seed=1)
    for kind in ("DKD", "KD+REVIEWKD"):
        with pytest.raises(UserError, match="student tells 4 classes apart and the teacher 5"):
            join(kind, None, other)
    assert step(join("REVIEWKD", None, other))["loss_review"].isfinite()


def test_methods_that_make_no_sense():
    with pytest.raises(UserError, match=r"unknown detection method.*'DKDD'.*did you mean 'DKD'"):
        join("DKDD")
    with pytest.raises(UserError, match=r"DISTILLER.TYPE DKD\+DKD names a method twice"):
        join("DKD+DKD")
    net = detector()
    with pytest.raises(UserError, match="one and the same network"):
        join("DKD", net, net)


def test_a_method_from_elsewhere(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mdistiller.detection.methods import METHODS, Method\n\n"
        "@METHODS.register('GAP', config={'WEIGHT': 1.0, 'POWER': 2.0})\n"
        "class Gap(Method):\n"
        "    loss = 'loss_gap'\n"
        "    def forward(self, views):\n"
        "        return self.weight * (views.student['0'] - views.teacher['0']).square().mean()\n"
    )
    try:
        words = ["DISTILLER.TYPE", "GAP+DKD", "DETECTION.GAP.WEIGHT", "0.5"]
        cfg = load_config("", words, imports=[str(path)])
        losses = step(DetectionDistiller(detector(), detector(seed=1), cfg).train())
    finally:
        METHODS.pop("GAP", None)
        METHODS.config.pop("GAP", None)
    assert {"loss_gap", "loss_dkd"} <= set(losses)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("TEACHER.WEIGHTS ''", "DKD needs a trained teacher: set DETECTION.TEACHER.WEIGHTS"),
        ("TEACHER.WEIGHTS none.pth", "DETECTION.TEACHER.WEIGHTS: none.pth does not exist"),
        ("TEACHER.INPUT upstream_r18", "upstream_r18 is for the student"),
        ("STUDENT.INPUT upstream_r18_teacher", "upstream_r18_teacher is for the teacher"),
        ("TEACHER.NEW_HEAD True", "NEW_HEAD starts the teacher's classifier anew, and DKD"),
        ("STUDENT.INPUT bgr", None),
        (
            "TEACHER.INPUT bgr",
            "is of a detector with INPUT rgb, but DETECTION.TEACHER.INPUT is bgr",
        ),
        ("TEACHER.FLAVOUR d2", "is of a detector with FLAVOUR tv"),
    ],
)
def test_mixed_up_networks(tmp_path, words, message):
    """Teacher and student of a config; the teacher's file is of a run and says what it is of."""
    net = detector(seed=1)
    path = tmp_path / "teacher.pth"
    torch.save({"model": net.state_dict(), "detector": net.facts}, path)
    keys = {key: value for key, value in node().items() if key != "WEIGHTS"}
    small = [f"DETECTION.{r}.{key}" for r in ("STUDENT", "TEACHER") for key in keys]
    pairs = [word for key in small for word in (key, keys[key.rpartition(".")[2]])]
    key, value = words.split()
    pairs += ["DETECTION.TEACHER.WEIGHTS", str(path), f"DETECTION.{key}", value.strip("'")]
    cfg = load_config("", ["DISTILLER.TYPE", "DKD", *pairs])
    if message is None:
        assert same_state(
            build_distiller(cfg, list("abcd"), torch.device("cpu")).guide.state_dict(),
            net.state_dict(),
        )
        return
    with pytest.raises(UserError, match=re.escape(message)):
        build_distiller(cfg, list("abcd"), torch.device("cpu"))
