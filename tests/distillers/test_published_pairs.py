"""Every per-pair config of the modern methods against the weights that their authors published.

The tables are literals on purpose: none is read from the code or from another config.
"""

import pytest
from support import REPO

from mdistiller.config.values import lookup
from mdistiller.engine.cfg import load_config

CIFAR100 = REPO / "configs" / "cifar100"

# LSKD (from the names of its released logs): base temperature, weight, and DKD's beta
LSKD = """
res32x4_res8x4    2 9   2 9 8    2 9
vgg13_vgg8        3 9   2 15 2   2 6
wrn40_2_wrn40_1   2 9   2 12 2   2 9
wrn40_2_wrn16_2   2 9   2 12 2   2 9
res56_res20       2 9   3 18 2   - -
res110_res32      2 9   2 15 2   2 9
res110_res20      4 12  2 15 2   2 9
res32x4_shuv2     2 9   2 9 8    2 6
res32x4_wrn16_2   3 9   2 9 2    2 9
res32x4_wrn40_2   3 9   2 9 8    2 9
wrn40_2_res8x4    2 9   2 18 2   2 9
wrn40_2_mv2       3 9   2 15 2   - -
vgg13_mv2         3 9   3 9 2    2 6
res50_mv2         3 1   2 15 2   2 9
"""

# CAT-KD: beta, side of the maps, normalised
CATKD = """
res110_res32     1.8 2 False
res32x4_res8x4   15  2 False
res56_res20      0.7 2 False
vgg13_vgg8       4.5 2 False
wrn40_2_wrn16_2  12  2 False
wrn40_2_wrn40_1  1.5 2 False
res32x4_shuv1    600 4 True
res32x4_shuv2    600 4 True
wrn40_2_shuv1    80  4 True
res50_mv2        40  2 True
vgg13_mv2        15  2 True
"""

# TTM, WTTM and WTTM + CRD (appendix A.4): gamma, beta
TTM = """
wrn40_2_wrn16_2  0.1 101  0.1 4     0.1 4
wrn40_2_wrn40_1  0.1 76   0.1 3     0.1 2
res56_res20      0.3 7    0.3 1.5   0.3 0.6
res110_res20     0.2 8    0.2 2     0.2 1.4
res110_res32     0.1 33   0.1 1.5   0.2 1
res32x4_res8x4   0.1 100  0.1 3     0.2 4
vgg13_vgg8       0.1 45   0.1 2.25  0.2 4
vgg13_mv2        0.2 16   0.2 3     - -
res50_mv2        0.2 20   0.2 5     - -
res50_vgg8       0.1 70   0.1 2     - -
res32x4_shuv1    0.2 12   0.2 1.4   - -
res32x4_shuv2    0.4 40   0.4 16    - -
wrn40_2_shuv1    0.3 8    0.3 3     - -
"""

DKD_BETA = {"res56_res20": 2, "res110_res32": 2} | dict.fromkeys(
    ("vgg13_vgg8", "vgg13_mv2", "wrn40_2_wrn16_2", "wrn40_2_wrn40_1"), 6
)


SAME_FAMILY = (
    *("res56_res20", "res110_res32", "res32x4_res8x4"),
    *("wrn40_2_wrn16_2", "wrn40_2_wrn40_1", "vgg13_vgg8"),
)
TTM_KINDS = ("ttm", "wttm", "wttm_crd")


def rows(table):
    words = {"-": None, "True": True, "False": False}
    for line in table.strip().splitlines():
        pair, *values = line.split()
        yield pair, [words[value] if value in words else float(value) for value in values]


def published():
    """(file, type, settings) for every cell of the tables."""
    for pair, (kd_t, kd, dkd_t, dkd, beta, mlkd_t, mlkd) in rows(LSKD):
        on = {"LSKD.ENABLE": True}
        kd_part = {"KD.TEMPERATURE": kd_t, "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": kd}
        yield f"lskd/kd/{pair}", "KD", on | kd_part
        # the weight multiplies the whole of DKD
        dkd_part = {"DKD.T": dkd_t, "DKD.ALPHA": dkd, "DKD.BETA": dkd * beta, "DKD.CE_WEIGHT": 1.0}
        yield f"lskd/dkd/{pair}", "DKD", on | dkd_part
        ctkd_part = {"CTKD.LOSS.KD_WEIGHT": 9.0, "CTKD.LOSS.CE_WEIGHT": 0.1}
        yield f"lskd/ctkd/{pair}", "CTKD", on | ctkd_part
        if mlkd:
            temps = [mlkd_t, 3.0, 5.0, 2.0, 6.0]
            mlkd_part = {"MLKD.LOSS.KD_WEIGHT": mlkd, "MLKD.TEMPS": temps}
            yield f"lskd/mlkd/{pair}", "MLKD", on | mlkd_part
    for pair, (beta, side, normalised) in rows(CATKD):
        settings = {"CATKD.BETA": beta, "CATKD.RES": side, "CATKD.NORMALIZE": normalised}
        yield f"catkd/{pair}", "CATKD", settings
    for pair, values in rows(TTM):
        for name, gamma, beta in zip(TTM_KINDS, values[::2], values[1::2], strict=True):
            if gamma:
                node = name.upper().split("_")[0]
                method = {"wttm_crd": "WTTM+CRD"}.get(name, node)
                yield f"{name}/{pair}", method, {f"{node}.GAMMA": gamma, f"{node}.BETA": beta}
    for path in sorted((CIFAR100 / "sdd").rglob("*.yaml")):
        pair, base = path.stem, {"sdd": "DKD"}.get(path.parent.name, path.parent.name.upper())
        settings = {
            "SDD.BASE": base,
            "SDD.SCALES": [1, 2] if pair in SAME_FAMILY else [1, 2, 4],
            "SDD.COMP_WEIGHT": 2.0,
            "SOLVER.CLIP_GRAD_NORM": 40.0,
        } | {
            "KD": {"SDD.KD.CE_WEIGHT": 0.1, "SDD.KD.KD_WEIGHT": 0.9, "SDD.KD.WARMUP": 0},
            "DKD": {"SDD.DKD.BETA": DKD_BETA.get(pair, 8.0), "SDD.DKD.WARMUP": 20},
            "NKD": {"SDD.NKD.T": 4.0, "SDD.NKD.GAMMA": 8.0, "SDD.NKD.WARMUP": 20},
        }[base]
        yield str(path.relative_to(CIFAR100).with_suffix("")), "SDD", settings


CELLS = list(published())


def test_every_pair_has_its_published_weights():
    wrong = []
    for name, method, settings in CELLS:
        cfg = load_config(CIFAR100 / f"{name}.yaml")
        keys = ("DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT", *settings)
        kind, teacher, student, *values = (lookup(cfg, key) for key in keys)
        got = kind, pair_name(teacher, student), values
        if got != (method, name.split("/")[-1], list(settings.values())):
            wrong.append((name, got))
    assert wrong == []


SHORT = {"ResNet": "res", "resnet": "res", "MobileNetV": "mv", "Shuffle": "shu", "V": "v"} | {
    "wrn_40_": "wrn40_",
    "wrn_16_": "wrn16_",
}


def pair_name(teacher, student):
    name = f"{teacher}_{student}"
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


@pytest.mark.parametrize(
    "folder", ["lskd/kd", "lskd/dkd", "lskd/ctkd", "lskd/mlkd", "catkd", *TTM_KINDS]
)
def test_no_config_is_without_a_published_weight(folder):
    files = {f"{folder}/{path.stem}" for path in (CIFAR100 / folder).glob("*.yaml")}
    assert files == {cell[0] for cell in CELLS if cell[0].rsplit("/", 1)[0] == folder}
