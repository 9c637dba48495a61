"""Students under teachers, one or two steps of small networks."""

import copy
import re

import pytest
import torch
from nets import detector, images, node, targets
from support import same_state

from mdistiller.detection.config import load_config
from mdistiller.detection.distillers import DetectionDistiller
from mdistiller.detection.methods import DETECTOR_SETTINGS, build_method, method_names
from mdistiller.detection.networks.backbones import with_frozen_norms
from mdistiller.detection.run import build_distiller
from mdistiller.distillers import DISTILLERS
from mdistiller.registry import UserError, is_builtin

EVERY = "+".join(DETECTOR_SETTINGS)
TERMS = {"loss_kd", "loss_dkd", "loss_review", "loss_fitnet"}
OWN = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
LOGIT_METHODS = {
    *("CORRECTEDKD", "CTKD", "DGKD", "DIST", "DKD", "GDKD", "GDKD3", "KD", "LDRLD", "LOGITS"),
    *("NKD", "NORMKD", "RLD", "TTM", "WKD", "WTTM"),
}
MAP_METHODS = {"AT", "FITNET", "KDSVD", "NST", "REVIEWKD", "SEMCKD", "SP", "VID"}


def join(kind, student=None, teacher=None, *words):
    student = detector() if student is None else student
    teacher = detector(seed=1) if teacher is None else teacher
    cfg = load_config("", ["DISTILLER.TYPE", kind, *words])
    torch.manual_seed(2)  # of what methods add
    return DetectionDistiller(student, None if kind == "NONE" else teacher, cfg).train()


def step(distiller, masks=False, seed=0):
    """The terms of a step; the second image has no object."""
    torch.manual_seed(seed)  # regions are sampled
    return distiller(images=images(), targets=targets(masks))[1]


def test_a_step_trains_all_there_is_to_train():
    distiller = join(EVERY)
    losses = step(distiller)
    assert set(losses) == OWN | TERMS
    sum(losses.values()).backward()
    for key, parameter in distiller.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    losses = step(distiller)
    stem = next(distiller.student.backbone.body.parameters())
    for name in TERMS:
        stem.grad = None
        losses[name].backward(retain_graph=True)
        assert stem.grad.norm() > 0, name


def test_every_method_takes_a_step_or_is_refused_in_a_line():
    """Under the methods' own defaults; outputs of the student are leaves here, to save time."""
    student, teacher = detector(), detector(seed=1)
    with torch.no_grad():
        torch.manual_seed(0)
        batch, _ = student.prepare(images())
        features = student.backbone(batch.tensors)
        student.losses(batch, features, targets())
        samples = student.roi_heads.samples
        maps = teacher.eval().backbone(batch.tensors)
        judged = teacher.roi_logits(maps, samples.proposals, batch.image_sizes)
    logits = samples.logits.requires_grad_()
    features = {name: level.requires_grad_() for name, level in features.items()}
    ran, wrong = set(), []
    ours = {name for name, cls in DISTILLERS.items() if is_builtin(cls)}  # no other test's
    for name in sorted(ours - {"NONE"}):
        logits.grad = None
        for level in features.values():
            level.grad = None
        try:
            cfg = load_config("", ["DISTILLER.TYPE", name])
            distiller = DetectionDistiller(student, teacher, cfg).train()
            distiller.try_methods()
        except UserError as error:
            if not str(error).startswith(f"DISTILLER.TYPE {name} cannot") or "\n" in str(error):
                wrong.append(f"{name}: {error}")
            continue
        losses = distiller.distill_regions((logits, features), (judged, maps), samples.labels, 1)
        (loss,) = losses.values()
        loss.backward()
        grads = [t.grad for t in (logits, *features.values()) if t.grad is not None]
        if not loss.isfinite() or not any(grad.abs().sum() > 0 for grad in grads):
            wrong.append(f"{name}: {loss.item()}")
        ran.add(name)
    assert wrong == []
    assert ran == LOGIT_METHODS | MAP_METHODS


def test_what_a_method_asks_for_in_vain():
    pair = detector(), detector(seed=1)
    for kind, settings, reason in [
        ("CRLD", (), "it needs two views of each image"),
        ("USKD", (), "it has no teacher"),
        ("SIMKD", (), "it gives the student another head"),
        ("CRD", (), "it remembers every training sample"),
        ("OFD", (), "it needs the teacher in training mode"),
        ("RKD", (), "this method needs 'pooled_feat'"),
        ("FT", (), "a stage of training before the main one"),
        ("WKD", ("WKD.COST", "cka"), "it needs class_cost of the teacher and all training images"),
        ("DIST", ("DIST.TAU", "0"), "DIST.TAU must be positive"),
        ("KD", ("DETECTION.KD.T", "0"), "DETECTION.KD: KD.TEMPERATURE must be positive"),
    ]:
        with pytest.raises(UserError, match=f"DISTILLER.TYPE {kind} cannot .*{re.escape(reason)}"):
            join(kind, *pair, *settings).try_methods()
    with pytest.raises(UserError, match=r"DIST.LOSS.CE_WEIGHT 0.5 has no effect in detection"):
        join("DIST", *pair, "DIST.LOSS.CE_WEIGHT", "0.5")
    with pytest.raises(UserError, match=r"LSKD.ENABLE: NST has no use for standardised logits"):
        join("NST", *pair, "LSKD.ENABLE", "True")
    with pytest.raises(UserError, match=r"unknown config key DKD"):
        load_config("", ["DKD.BETA", "1.0"])


def test_methods_that_relate_images_want_one_process(monkeypatch):
    monkeypatch.setattr("mdistiller.detection.methods.world_size", lambda: 2)
    with pytest.raises(UserError, match="SP cannot train a detector: it compares the maps of all"):
        method_names("SP+DKD")


def test_a_networks_without_the_pyramid_learns_from_logits_only():
    student = detector(ARCH="fasterrcnn_mobilenet_v3_large_fpn", CHANNELS=256)
    teacher = detector(ARCH="fasterrcnn_mobilenet_v3_large_fpn", CHANNELS=256)
    assert join("DIST", student, teacher).methods
    with pytest.raises(UserError, match=r"pyramids from P2 to P6, which fasterrcnn_mobilenet_v3"):
        join("VID", student, teacher)


def test_levels_and_standardised_logits():
    student, maps = detector(), {name: torch.zeros(1, 32, 2, 2) for name in "0123"}
    cfg = load_config("", ["DISTILLER.TYPE", "AT", "DETECTION.LEVELS", "['P4', 'P3']"])
    feats = build_method("AT", student, detector(), cfg).student.features(maps)["feats"]
    assert [id(level) for level in feats] == [id(maps[name]) for name in ("1", "1", "2")]
    losses = [
        step(join("KD", None, None, "LSKD.ENABLE", switch))["loss_kd"].item()
        for switch in ("False", "True")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=0.05)


def test_wkd_compares_regions_and_maps():
    weights = ["WKD.LOSS.WKD_LOGIT_WEIGHT", "30", "WKD.LOSS.WKD_FEAT_WEIGHT", "0.1"]
    distiller = join("WKD", None, None, *weights, "WKD.HINT_LAYERS", "[2, 4]")
    loss = step(distiller)["loss_wkd"]
    loss.backward()
    assert loss.isfinite()
    assert {"wkd_target", "wkd_logit", "wkd_feat"} <= distiller.metrics.keys()
    assert distiller.methods["WKD"].class_cost.shape == (4, 4)
    layer = distiller.student.roi_heads.box_predictor.cls_score.weight
    assert layer.grad.abs().sum() > 0
    p3, p4, p5 = (block[0].weight.grad for block in distiller.student.backbone.fpn.layer_blocks[1:])
    assert p3.abs().sum() > 0
    assert p5.abs().sum() > 0
    assert p4 is None or not p4.any()


def test_a_method_keeps_its_own_optimizer_settings():
    groups = join("CTKD+REVIEWKD", None, None, "CTKD.PARAM_WD", "0.25").param_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, 0.25]


def test_the_teacher_stays_as_it_is():
    distiller = join(EVERY)
    teacher = distiller.teacher
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
    assert distiller.teacher is None
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
        with pytest.raises(UserError, match="student has 4 classes and the teacher 5"):
            join(kind, None, other)
    assert step(join("REVIEWKD", None, other))["loss_review"].isfinite()


def test_methods_that_make_no_sense():
    with pytest.raises(UserError, match=r"unknown distiller.*'DKDD'.*did you mean 'DKD'"):
        join("DKDD")
    with pytest.raises(UserError, match=r"DISTILLER.TYPE DKD\+DKD names a method twice"):
        join("DKD+DKD")
    net = detector()
    with pytest.raises(UserError, match="one and the same network"):
        join("DKD", net, net)


def test_a_method_from_elsewhere(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mdistiller.distillers import DISTILLERS, Distiller\n\n"
        "@DISTILLERS.register('GAP', config={'WEIGHT': 1.0, 'POWER': 2.0})\n"
        "class Gap(Distiller):\n"
        "    needs_teacher_classifier = False\n"
        "    def __init__(self, student, teacher, cfg):\n"
        "        super().__init__(student, teacher)\n"
        "        self.weight = cfg.GAP.WEIGHT\n"
        "    def distill(self, student, teacher, target, **batch):\n"
        "        gap = student['feats'][1] - teacher['feats'][1]\n"
        "        return self.weight * gap.square().mean()\n"
    )
    try:
        words = ["DISTILLER.TYPE", "GAP+DKD", "GAP.WEIGHT", "0.5"]
        cfg = load_config("", words, imports=[str(path)])
        losses = step(DetectionDistiller(detector(), detector(seed=1), cfg).train())
    finally:
        DISTILLERS.pop("GAP", None)
        DISTILLERS.config.pop("GAP", None)
    assert {"loss_gap", "loss_dkd"} <= set(losses)


SWAPPED = [
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
]


def test_swapped_networks(tmp_path):
    """Teacher and student of a config; the teacher's file is of a run and describes it."""
    net = detector(seed=1)
    path = tmp_path / "teacher.pth"
    torch.save({"model": net.state_dict(), "detector": net.facts}, path)
    keys = {key: value for key, value in node().items() if key != "WEIGHTS"}
    common = ["DISTILLER.TYPE", "DKD", "DETECTION.TEACHER.WEIGHTS", str(path)]
    for role in ("STUDENT", "TEACHER"):
        common += [word for k in keys for word in (f"DETECTION.{role}.{k}", keys[k])]
    for words, message in SWAPPED:
        key, value = words.split()
        cfg = load_config("", [*common, f"DETECTION.{key}", value.strip("'")])
        if message is None:
            built = build_distiller(cfg, list("abcd"), torch.device("cpu"))
            assert same_state(built.teacher.state_dict(), net.state_dict())
            continue
        with torch.device("meta"), pytest.raises(UserError, match=re.escape(message)):
            build_distiller(cfg, list("abcd"), torch.device("cpu"))
