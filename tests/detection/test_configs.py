"""Every YAML file below configs/coco loads, and its networks and methods can be built."""

import pytest
import torch
from support import REPO

from mdistiller.detection.config import load_config
from mdistiller.detection.distillers import DetectionDistiller
from mdistiller.detection.methods import method_names
from mdistiller.detection.networks.models import build_detector

FILES = {
    path.relative_to(REPO / "configs" / "coco").as_posix(): path
    for path in sorted((REPO / "configs" / "coco").rglob("*.yaml"))
}
ORIGINAL = [
    *(f"dkd/DKD-{pair}.yaml" for pair in ("R18-R101", "R50-R101", "MV2-R50")),
    *(f"reviewdkd/ReviewDKD-{pair}.yaml" for pair in ("R18-R101", "R50-R101", "MV2-R50")),
    *(f"reviewkd/ReviewKD-{pair}.yaml" for pair in ("R18-R101", "R50-R101", "MV2-R50")),
    *(f"reviewkd/ReviewKD-{pair}-Mask.yaml" for pair in ("R18-R101", "R50-R101", "MV2-R50")),
]


_made = {}


def build(cfg, role, classes):
    """A network of a config without weights to look for, and without memory; made once."""
    node = cfg.DETECTION[role].clone()
    node.defrost()
    node.WEIGHTS, node.BACKBONE_WEIGHTS, node.NORM, node.FREEZE_AT = "", "", "batch", 0
    key = (role, classes, repr(node))
    if key not in _made:
        _made[key] = build_detector(node, classes)
    return _made[key]


@pytest.mark.parametrize("name", FILES)
def test_a_config_builds(name):
    cfg = load_config(FILES[name])
    classes = 4 if "bccd" in name else 81
    with torch.device("meta"):
        student, teacher = (build(cfg, role, classes) for role in ("STUDENT", "TEACHER"))
        distiller = DetectionDistiller(student, teacher, cfg)
    assert list(distiller.methods) == method_names(cfg.DISTILLER.TYPE)
    if "bccd" in name:  # from nothing, so nothing may be constant
        assert cfg.DETECTION.STUDENT.NORM == "batch"
        assert not cfg.DETECTION.STUDENT.FREEZE_AT
    else:
        assert cfg.DETECTION.STUDENT.BACKBONE_WEIGHTS
    alone = name.startswith("_base_") or name in ("bccd/teacher.yaml", "bccd/student.yaml")
    assert bool(distiller.methods) != alone


def test_the_originals_configs_are_there():
    assert set(ORIGINAL) <= set(FILES)


@pytest.mark.parametrize(
    ("name", "role", "millions"),
    [
        ("dkd/DKD-R18-R101.yaml", "STUDENT", 28.67),
        ("dkd/DKD-R18-R101.yaml", "TEACHER", 60.64),
        ("dkd/DKD-MV2-R50.yaml", "STUDENT", 19.16),
    ],
)
def test_networks_have_the_originals_sizes(name, role, millions):
    """Up to batch norms, which are counted here and were constants there, and 4 unused rows."""
    cfg = load_config(FILES[name])
    with torch.device("meta"):
        net = build(cfg, role, 81)
    norms = (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    constant = sum(2 * norm.num_features for norm in norms)
    unused = 4 * 1025
    own = sum(p.numel() for p in net.parameters()) - constant - unused
    assert own / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("reviewkd/ReviewKD-R18-R101.yaml", 1.2),
        ("reviewkd/ReviewKD-R50-R101.yaml", 1.0),
        ("reviewdkd/ReviewDKD-MV2-R50.yaml", 2.0),
        ("reviewkd/ReviewKD-R18-R101-Mask.yaml", 1.5),
        ("reviewkd/ReviewKD-R50-R101-Mask.yaml", 0.8),
        ("reviewkd/ReviewKD-MV2-R50-Mask.yaml", 1.0),
    ],
)
def test_review_has_the_originals_weights(name, weight):
    cfg = load_config(FILES[name])
    dkd, review = cfg.DETECTION.DKD, cfg.DETECTION.REVIEWKD
    assert weight == review.WEIGHT
    assert (dkd.ALPHA, dkd.BETA, dkd.T, dkd.WEIGHT) == (1.0, 0.25, 1.0, 1.0)
    solver = cfg.SOLVER
    assert (solver.LR, solver.MAX_ITER, solver.STEPS) == (0.01, 180000, [120000, 160000])
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.MOMENTUM) == (1e-4, 0.0, 0.9)
    student, teacher = cfg.DETECTION.STUDENT, cfg.DETECTION.TEACHER
    assert student.MASK is name.endswith("-Mask.yaml")
    assert student.FLAVOUR == teacher.FLAVOUR == "d2"
