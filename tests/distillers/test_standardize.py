"""Standardised logits (LSKD): the values, and the switch on methods, sums, forks' configs."""

import statistics

import pytest
import torch
from modern_golden import check_golden
from rough import hostile_logits
from support import golden_values, saved_teacher, write_config
from test_distillers import batch, networks

from mdistiller.cli import train as train_command
from mdistiller.distillers import DISTILLERS, Distiller, get_distiller
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.helpers.losses.standardize import standardize
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.registry import UserError

ON = ["LSKD.ENABLE", True]
TAKERS = sorted(
    name
    for name, cls in DISTILLERS.items()
    if cls.takes_standardized_logits and cls.forward_train is Distiller.forward_train
)


def build(name, *overrides):
    cfg = default_config()
    cfg.merge_from_list(overrides)
    return get_distiller(name).build(*networks(), cfg, 50, (32, 32)).train()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_kd_on_standardised_logits_is_the_recorded(variant):
    settings = {"code": (True, 1e-7), "paper": (False, 0.0)}[variant]

    def loss(t, h):
        logits = (standardize(t[name], *settings) for name in ("zs", "zt"))
        return kd_loss(*logits, h["temperature"])

    check_golden("lskd_kd_T2" + {"code": "", "paper": "_paper"}[variant], loss)


def test_dkd_on_standardised_logits_is_the_recorded():
    def loss(t, h):
        logits = (standardize(t[name]) for name in ("zs", "zt"))
        return dkd_loss(*logits, t["y"], h["alpha"], h["beta"], h["temperature"])

    check_golden("lskd_dkd_T2", loss)


@pytest.mark.parametrize("unbiased", [True, False])
def test_values_by_hand(unbiased):
    logits = 3 * golden_values((4, 6), 5)
    spread = statistics.stdev if unbiased else statistics.pstdev
    want = [
        [(v - statistics.mean(row)) / (spread(row) + 0.1) for v in row] for row in logits.tolist()
    ]
    got = standardize(logits, unbiased, eps=0.1)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    regions = torch.stack([logits, 2 * logits + 1], dim=2)  # [N, C, R]: each region by itself
    by_region = standardize(regions, unbiased, eps=0.0)
    torch.testing.assert_close(by_region[..., 0], by_region[..., 1])


def test_the_gradient_is_orthogonal_to_shift_and_scale_and_shrinks_with_the_scale():
    logits, teacher = (golden_values((4, 6), seed) for seed in (1, 2))
    slopes = []
    for scale in (1, 1000):
        student = (scale * logits).requires_grad_()
        kd_loss(standardize(student, eps=0), standardize(teacher, eps=0), 2.0).backward()
        slopes.append(student.grad)
        centred = logits - logits.mean(dim=1, keepdim=True)
        assert student.grad.sum(dim=1).abs().max() < 1e-15
        assert (student.grad * centred).sum(dim=1).abs().max() < 1e-15
    torch.testing.assert_close(slopes[0], 1000 * slopes[1])


def test_hostile_logits_have_deviation_one_or_are_zeros():
    for kind, rows in hostile_logits().items():
        for eps, offset in ((1e-7, 0.0), (0.0, 7.7)):
            logits = (rows + offset).requires_grad_()
            values = standardize(logits, eps=eps)
            (values * torch.arange(10.0)).sum().backward()
            assert torch.isfinite(logits.grad).all(), kind
            if kind in ("zeros", "constant"):  # not 1 / eps
                assert not values.any(), kind
                assert not logits.grad.any(), kind
            else:
                torch.testing.assert_close(values.std(dim=1), torch.ones(5), rtol=1e-3, atol=0)


def test_one_class_gives_zeros():
    assert not standardize(torch.tensor([[3.0], [4.0]])).any()


@pytest.mark.parametrize("name", TAKERS)
def test_the_switch_gives_the_method_standardised_logits_and_cross_entropy_raw_ones(name):
    distiller, plain = build(name, *ON), build(name)
    seen = []
    usual = distiller.distill

    def distill(student, teacher, target, **facts):
        seen.extend([student, teacher])
        return usual(student, teacher, target, **facts)

    distiller.distill = distill
    logits, losses = distiller(**batch())
    want, raw = plain(**batch())
    assert torch.equal(logits, want)
    assert torch.equal(losses["loss_ce"], raw["loss_ce"])
    assert losses["loss_kd"].item() != raw["loss_kd"].item()
    for output in seen:
        torch.testing.assert_close(output.logits.mean(dim=1), torch.zeros(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.logits.std(dim=1), torch.ones(6), rtol=1e-4, atol=0)
        assert "feats" in output.features
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.get_learnable_parameters())


def test_methods_that_take_the_switch():
    takers = {name for name, cls in DISTILLERS.items() if cls.takes_standardized_logits}
    wanted = {"KD", "DKD", "LOGITS", "DIST", "CTKD", "NKD", "TTM", "WTTM", "DGKD", "MLKD"}
    wanted |= {"RLD", "GDKD", "GDKD3", "CRLD", "LDRLD", "NORMKD", "CORRECTEDKD"}
    assert wanted <= takers
    assert takers.isdisjoint({"NONE", "USKD", "AT", "SP", "CRD", "REVIEWKD"})


def test_flavour_and_epsilon_are_settings():
    logits, teacher = networks()
    z, v = (n.train(mode)(batch()["image"])[0] for n, mode in ((logits, True), (teacher, False)))
    for overrides, settings in (
        ([], (True, 1e-7)),
        (["LSKD.UNBIASED", False, "LSKD.EPS", 0], (False, 0.0)),
        (["LSKD.EPS", 0.5], (True, 0.5)),
    ):
        _, losses = build("KD", *ON, *overrides)(**batch())
        want = 0.9 * kd_loss(standardize(z, *settings), standardize(v, *settings), 4.0)
        assert losses["loss_kd"].item() == pytest.approx(want.item(), rel=1e-5)


def test_in_a_sum_the_parts_that_take_it_do():
    _, both = build("KD+AT", *ON)(**batch())
    _, kd = build("KD", *ON)(**batch())
    _, at = build("AT")(**batch())
    want = (kd["loss_kd"] + at["loss_kd"]).item()
    assert both["loss_kd"].item() == pytest.approx(want, rel=1e-6)


def test_the_name_of_forks_switches_it_on_too():
    _, ours = build("KD", *ON)(**batch())
    _, theirs = build("KD", "EXPERIMENT.LOGIT_STAND", True)(**batch())
    assert theirs["loss_kd"].item() == ours["loss_kd"].item()


def run(folder, method, *words):
    folder.mkdir()
    teacher = str(saved_teacher(folder))
    config = write_config(folder, method=method, epochs=1, TEACHER="resnet8", TEACHER_CKPT=teacher)
    return train_command.main(["--cfg", str(config), *map(str, words)])


def test_methods_without_use_for_it_refuse_it_at_once(tmp_path, capsys):
    for number, method in enumerate(("AT", "USKD", "NONE", "AT+SP")):
        # before a teacher is looked for
        words = ["LSKD.ENABLE", "True", "DISTILLER.TEACHER_CKPT", "nowhere"]
        assert run(tmp_path / str(number), method, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: LSKD.ENABLE: {method} has no use for standardised logits")
        assert error.count("\n") == 1
    with pytest.raises(UserError, match=r"LSKD\.EPS must be at least 0"):
        load_config("", ["LSKD.EPS", "-1"])


def test_a_run_records_the_switch_and_is_not_resumed_without_it(tmp_path, capsys):
    words = ["EXPERIMENT.NAME", "run"]
    assert run(tmp_path / "a", "KD", *ON, *words) == 0
    record = (tmp_path / "a" / "out" / "toy" / "run" / "config.yaml").read_text()
    assert load_config(tmp_path / "a" / "out" / "toy" / "run" / "config.yaml").LSKD.ENABLE
    assert "LSKD:\n  ENABLE: true" in record
    capsys.readouterr()
    config = str(tmp_path / "a" / "toy.yaml")
    assert train_command.main(["--cfg", config, "--resume", *words]) == 2
    assert "LSKD.ENABLE was True, is now False" in capsys.readouterr().err


def test_published_weights_are_configs():
    kd = load_config("configs/cifar100/lskd/kd/res110_res20.yaml")
    assert (kd.KD.TEMPERATURE, kd.KD.LOSS.CE_WEIGHT, kd.KD.LOSS.KD_WEIGHT) == (4, 0.1, 12)
    dkd = load_config("configs/cifar100/lskd/dkd/vgg13_vgg8.yaml")
    assert (dkd.DKD.ALPHA, dkd.DKD.BETA, dkd.DKD.T, dkd.DKD.WARMUP) == (15, 30, 2, 20)
    ctkd = load_config("configs/cifar100/lskd/ctkd/wrn40_2_mv2.yaml")
    assert (ctkd.CTKD.LOSS.KD_WEIGHT, ctkd.SOLVER.LR) == (9, 0.01)
    assert all(cfg.LSKD.ENABLE for cfg in (kd, dkd, ctkd))
