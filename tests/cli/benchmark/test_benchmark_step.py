"""The benchmark of a training step: equal loops, parts that add up, its report and refusals."""

import copy
import json

import pytest
import torch

from benchmarks import main as benchmark
from benchmarks import memory
from benchmarks.clock import PARTS, Clock, put_on_clock
from benchmarks.step_data import classic_loader, generated_data, untrained_distiller
from benchmarks.step_loops import Bare, Classic, Ours
from benchmarks.textbook import textbook_loss
from mdistiller.engine.cfg import load_config
from mdistiller.engine.metrics import Meters

CPU = torch.device("cpu")


def setting(method, *words, classes=0, student="resnet8", teacher="resnet8"):
    """Config, data and distiller of a small pair on 64 generated images; 0 classes: 10."""
    pair = ["DISTILLER.TYPE", method, "DISTILLER.STUDENT", student, "DISTILLER.TEACHER", teacher]
    cfg = load_config("", [*pair, "SOLVER.BATCH_SIZE", "16", "DATASET.TYPE", "cifar10", *words])
    cfg.defrost()
    data = generated_data(cfg, 64, classes, CPU)
    return cfg, data, untrained_distiller(cfg, data, CPU)


@pytest.mark.parametrize("method", ["NONE", "DKD", "KD+RKD", "CRD"])
def test_all_loops_have_the_same_loss_and_step(method):
    # CRD: 8 images of each of 8 classes, so that all rivals are drawn and nothing is left to chance
    cfg, data, distiller = setting(method, "CRD.NCE.K", "56", classes=8)
    batch = next(iter(data.train))
    ours = Ours(cfg, copy.deepcopy(distiller), data, 1)
    bare = Bare(cfg, copy.deepcopy(distiller), data, 1)
    classic = Classic(cfg, copy.deepcopy(distiller), data, 1, 0)
    assert classic.textbook == (method in ("KD", "DKD", "CRD"))
    meters = Meters()
    ours.trainer.model.train()
    for _ in range(2):  # the second has the weights that the first left
        ours.trainer.train_iter(batch, 1, meters)
        expected = meters["losses"].val
        assert float(bare.step(batch)) == pytest.approx(expected, rel=1e-4)
        assert classic.step(batch) == pytest.approx(expected, rel=1e-4)


def test_the_teacher_is_folded_in_all_but_the_classic_loop():
    cfg, data, distiller = setting("KD")
    assert distiller.frozen is not None
    assert Bare(cfg, copy.deepcopy(distiller), data, 1).distiller.frozen is not None
    assert Classic(cfg, copy.deepcopy(distiller), data, 1, 0).distiller.frozen is None


def test_the_classic_loop_is_in_nchw_whatever_ours_is():
    cfg, data, distiller = setting("KD", "SOLVER.CHANNELS_LAST", "True")
    nets = Bare(cfg, copy.deepcopy(distiller), data, 1), Classic(cfg, distiller, data, 1, 0)
    lies_last = []
    for loop in nets:
        for net in (loop.distiller.student, loop.distiller.teacher):
            convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
            convolutions[1].register_forward_hook(
                lambda layer, inputs, output: lies_last.append(
                    output.is_contiguous(memory_format=torch.channels_last)
                )
            )
        loop.distiller.frozen = None
        loop.step(next(iter(data.train)))
    assert lies_last == [True, True, False, False]


def test_the_textbook_stands_in_only_where_it_is_the_same_loss():
    for words in (("KD", "LSKD.ENABLE", "True"), ("DKD", "DKD.MODE", "nckd"), ("RKD",)):
        cfg, data, distiller = setting(*words)
        assert textbook_loss(cfg, distiller, data.train.dataset.targets) is None


def test_both_data_paths_normalise_the_same_images():
    cfg, data, _ = setting("NONE", "DATASET.AUGMENT", "none")

    def by_index(loader):
        images = {}
        for image, target, index in loader:
            images |= {int(i): (x, int(t)) for x, t, i in zip(image, target, index, strict=True)}
        return images

    ours, classic = by_index(data.train), by_index(classic_loader(cfg, data, 0))
    assert ours.keys() == classic.keys() == set(range(64))
    for key, (image, target) in ours.items():
        assert target == classic[key][1] == key % 10
        torch.testing.assert_close(image, classic[key][0], rtol=1e-5, atol=1e-5)


def test_time_within_a_part_is_the_inner_ones_and_the_sum_is_the_whole():
    clock = Clock("cpu")
    times = iter(range(100))
    clock.tick = lambda: next(times)  # every look at the clock is a second later
    with clock.part("outer"):  # 0 to 5
        with clock.part("inner"):  # 1 to 2
            pass
        clock.timed("inner", lambda: None)()  # 3 to 4
    assert clock.spent == {"outer": 3, "inner": 2}


@pytest.mark.parametrize("method", ["KD", "MLKD", "NONE"])
def test_every_part_of_a_step_is_on_the_clock_once(method):
    cfg, data, distiller = setting(method)
    ours = Ours(cfg, distiller, data, 2)
    clock = Clock("cpu")
    entered = []
    put_on_clock(ours.trainer, clock)
    inner = clock.part
    clock.part = lambda name: entered.append(name) or inner(name)
    before = copy.deepcopy(distiller.student.state_dict())
    ours.run()
    forwards = {"KD": 1, "MLKD": 2, "NONE": 1}[method]
    counts = {part: entered.count(part) / 2 for part in PARTS}
    assert counts["backward"] == counts["loss"] == 1
    assert counts["optimizer"] == 2  # zero_grad and step
    assert counts["student forward"] == forwards
    assert counts["teacher"] >= (0 if method == "NONE" else forwards)
    assert set(clock.spent) <= set(PARTS)
    assert not torch.equal(distiller.student.conv1.weight, before["conv1.weight"])


def test_the_report_has_loops_parts_and_operations(tmp_path, capsys, monkeypatch):
    def grown(work, *args, device):  # here, not in a process for each loop
        work(*args)()
        return 9.0

    monkeypatch.setattr(memory, "peak_growth", grown)
    path = tmp_path / "step.json"
    words = ["step", "--device", "cpu", "--batch", "8", "--rounds", "2", "--steps", "2"]
    words += ["--images", "32", "--memory", "--json", str(path), "DISTILLER.TYPE", "KD"]
    pair = ["DISTILLER.TEACHER", "resnet14", "DISTILLER.STUDENT", "resnet8"]
    assert benchmark.main([*words, *pair, "DATASET.TYPE", "cifar10"]) == 0
    printed = capsys.readouterr().out
    for name in ("ours", "bare", "classic (textbook loss)", *PARTS):
        assert f"| {name} " in printed
    report = json.loads(path.read_text())
    (row,) = report["step"]
    assert list(row["loops"]) == ["ours", "bare", "classic"]
    assert list(row["parts"]) == list(PARTS)
    alone = {key: taken["ms"] for key, taken in row["data"].items()}
    assert f"classic {alone['classic']:.3f} ({alone['classic'] / alone['ours']:.1f}x)" in printed
    assert 0 < alone["ours"] < alone["classic"] < row["loops"]["classic"]["ms"]
    for taken in row["loops"].values():
        assert taken["images_per_second"] == pytest.approx(8e3 / taken["ms"])
        assert taken["peak_mib"] == 9
    # multiply-adds by hand: resnet14 forward, resnet8 forward and twice that backward, but no
    # gradient to the images
    stem, first = 9 * 3 * 16 * 1024, 9 * 16 * 16 * 1024
    blocks = {14: (4, 3, 3), 8: (2, 1, 1)}
    total = {
        depth: stem + first * (count[0] + count[1] + count[2]) + 2 * first // 2 + fc_and_shortcuts()
        for depth, count in blocks.items()
    }
    expected = 2 * (total[14] + 3 * total[8] - stem)
    assert row["mflop_per_image"] == pytest.approx(expected / 1e6, rel=1e-6)
    peak = max(row["peak_gflops"].values()) * 1e3
    rate = row["loops"]["ours"]["images_per_second"]
    assert row["share_of_peak"] == pytest.approx(row["mflop_per_image"] * rate / peak)


def fc_and_shortcuts():
    """Multiply-adds of the classifier of 10 classes and the two projections of a CIFAR ResNet."""
    return 640 + 16 * 32 * 256 + 32 * 64 * 64


def test_bad_input_is_refused(capsys):
    assert benchmark.main(["losses", "SOLVER.LR", "1"]) == 2
    assert "belong to the suite step" in capsys.readouterr().err
    assert benchmark.main(["step", "--steps", "0"]) == 2
    assert "--steps and --images" in capsys.readouterr().err
    words = ["step", "--device", "cpu", "--images", "16", "DATASET.AUGMENT", "rotate_flip"]
    assert benchmark.main([*words, "DISTILLER.STUDENT", "resnet8", "SOLVER.BATCH_SIZE", "4"]) == 2
    assert "knows no DATASET.AUGMENT rotate_flip" in capsys.readouterr().err
