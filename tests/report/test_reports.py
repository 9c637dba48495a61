"""Reports: the statistics, what is grouped, compared and looked up, and nothing left out."""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from report_runs import config, make_run
from scipy import stats
from support import REPO, cache_yaml, write_config

from mdistiller.cli import sweep as sweep_command
from mdistiller.cli import train as train_command
from mdistiller.config.values import flatten, lookup
from mdistiller.distillers import distiller_dict
from mdistiller.engine.callbacks.default import Evaluate
from mdistiller.engine.cfg import load_config
from mdistiller.files.tables import csv_table
from mdistiller.registry import UserError
from mdistiller.report import curves, page
from mdistiller.report.build import build_report
from mdistiller.report.document import Chart, Line, markdown
from mdistiller.report.groups import find_baselines, grids, group, varying_keys
from mdistiller.report.latex import latex
from mdistiller.report.numbers import difference, estimate, holm, verdict
from mdistiller.report.published import Published, _configs, departures, published, published_for
from mdistiller.report.runs import read_runs

METHODS = {"plain": ("DISTILLER.TYPE", "NONE"), "KD": ("DISTILLER.TYPE", "KD")}
ENDS = {"plain": (70.0, 71.0, 72.0), "KD": (71.0, 73.0, 75.0)}


@pytest.fixture
def two(tmp_path):
    """Plain training and KD, three seeds each; one in a folder as earlier versions named it."""
    for name, pairs in METHODS.items():
        for seed, end in enumerate(ENDS[name]):
            folder = tmp_path / (f"{name}-seed={seed}" if seed else f"{name},seed:{seed}")
            make_run(folder, [20.0, end + 1, end], *pairs, seed=seed, teacher=80.0)
    return tmp_path


def rows(report, title):
    """The cells of a section's first table, by the name of the row."""
    (section,) = (s for s in report.sections if s.title == title)
    return {row[0]: row[1:] for row in section.tables[0].rows}


def flat(cfg):
    return {key: lookup(cfg, key) for key in flatten(cfg)}


# Numbers


def test_the_interval_is_scipys_and_the_hand_computed_one():
    found = estimate([70.0, 71.0, 72.0])
    low, high = stats.t.interval(0.95, 2, 71.0, stats.sem([70.0, 71.0, 72.0]))
    assert found.mean == 71.0
    assert found.half == pytest.approx((high - low) / 2)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975; 2) s / sqrt n
    assert estimate([5.0]).half is None
    assert estimate([]) is None


def test_differences_are_paired_by_seed():
    ours, base = {0: 71.0, 1: 73.0, 2: 75.0, 9: 0.0}, {2: 72.0, 1: 71.0, 0: 70.0, 8: 99.0}
    found = difference(ours, base)
    assert (found.mean, found.n) == (2.0, 3)  # 1, 2, 3: seeds that one of the two lacks stay out
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.p == pytest.approx(stats.ttest_rel([71, 73, 75], [70, 71, 72]).pvalue)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)  # t = 2 sqrt 3 with 2 degrees of freedom
    assert verdict(found, found.p) == "not told apart"


def test_what_concludes_nothing_says_so():
    one = difference({0: 71.0}, {0: 70.0})
    assert (one.mean, one.half, one.p) == (1.0, None, None)
    assert verdict(one, one.p) == "too few pairs to conclude (1)"
    two = difference({0: 80.0, 1: 80.1}, {0: 70.0, 1: 70.0})
    assert verdict(two, two.p).startswith("too few pairs")
    same = difference({0: 1.1, 1: 1.2, 2: 1.3}, {0: 0.1, 1: 0.2, 2: 0.3})
    assert same.p is None  # up to rounding they are all 1
    assert verdict(same, same.p) == "no test: every pair differs by the same"
    assert difference({0: 1.0}, {1: 1.0}) is None
    values = {seed: 70 + seed / 100 for seed in range(5)}
    noisy = {seed: value - 1 + (seed % 2) / 10 for seed, value in values.items()}
    for ours, base, said in ((values, noisy, "higher"), (noisy, values, "lower")):
        found = difference(ours, base)
        assert verdict(found, found.p) == said
        assert verdict(found, 0.06) == "not told apart"


def test_several_tests_are_judged_together():
    """By hand: 4 x 0.01; 3 x 0.02; then 2 x 0.03, which may not fall; 1 x 0.5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_p_that_one_test_would_do_with_is_not_enough_among_many(tmp_path):
    dkd = ("DISTILLER.TYPE", "DKD", "DKD.BETA")
    for number in range(4):
        for seed, noise in enumerate((0.0, 0.3, -0.2)):
            method = METHODS["plain"] if not number else (*dkd, number)
            end = 70.0 + (1.0 + noise if number else 0.0)
            make_run(tmp_path / f"{number},seed:{seed}", [end], *method, seed=seed)
    found = rows(build_report([tmp_path], "0"), "Differences to the baseline")
    p = float(found["1"][3])
    assert 0.017 < p < 0.05
    assert float(found["1"][4]) == pytest.approx(3 * p, rel=0.01)
    assert found["1"][0] == "not told apart"


# Groups


def test_runs_that_differ_only_in_the_seed_are_a_group(two):
    groups = {g.name: g for g in group(read_runs([two]))}
    assert {name: len(g.runs) for name, g in groups.items()} == {"plain": 3, "KD": 3}
    assert groups["KD"].by_seed(lambda run: run.number("last")) == dict(enumerate(ENDS["KD"]))
    assert set(varying_keys(list(groups.values()))) >= {"DISTILLER.TYPE", "KD.TEMPERATURE"}


def test_where_a_run_lies_and_keys_that_are_newer_than_it_part_no_group(tmp_path):
    make_run(tmp_path / "a" / "xEXPERIMENT.SEED:0", [50.0], "LOG.PREFIX", "a", "DEVICE", "cpu")
    other = make_run(
        tmp_path / "b" / "xEXPERIMENT.SEED:1", [52.0], "EXPERIMENT.PROJECT", "b", seed=1
    )
    text = (other / "config.yaml").read_text()
    assert "  NORM_DECAY: true\n" in text
    (other / "config.yaml").write_text(text.replace("  NORM_DECAY: true\n", ""))
    (found,) = group(read_runs([tmp_path]))
    assert (found.name, len(found.runs)) == ("x", 2)
    (other / "config.yaml").write_text(text.replace("NORM_DECAY: true", "NORM_DECAY: false"))
    first, second = group(read_runs([tmp_path]))
    assert (first.name, second.name) == ("x (NORM_DECAY=True)", "x (NORM_DECAY=False)")
    (other / "config.yaml").write_text(text.replace("SELECT_BY: top1", "SELECT_BY: loss"))
    first, second = group(read_runs([tmp_path]))  # what "best" means
    assert (first.name, second.name) == ("x (SELECT_BY=top1)", "x (SELECT_BY=loss)")


def test_runs_of_one_seed_count_once(tmp_path):
    for name, end in {"x,seed:0": 70.0, "copy/x,seed:0": 72.0, "x,seed:1": 75.0}.items():
        make_run(tmp_path / name, [end], seed=int(name[-1]))
    report = build_report([tmp_path])
    assert rows(report, "Accuracy")["x"][:2] == ["2", "73 ± 25"]  # of 71 and 75
    assert "Several runs of one seed count as their mean: x (seed 0)." in markdown(report)


def test_the_baseline_is_plain_training_of_the_same_student(two):
    make_run(two / "teacher", [80.0], "DISTILLER.STUDENT", "resnet56")
    groups = group(read_runs([two]))
    assert [g.name for g in find_baselines(groups, None)] == ["plain"]
    assert [g.name for g in find_baselines(groups, "KD")] == ["KD"]
    with pytest.raises(UserError, match=r"'plane'; did you mean 'plain'\?: the groups are KD, "):
        find_baselines(groups, "plane")
    groups[0].name = "no_distillation"  # the folder of a sweep's row
    assert find_baselines(groups, "no distillation") == [groups[0]]
    make_run(two / "plain, longer", [80.0], "SOLVER.EPOCHS", 20)
    assert find_baselines(group(read_runs([two])), None) == []


def test_every_student_has_its_own_baseline(tmp_path):
    for student, ends in (("resnet8", (50.0, 52.0)), ("resnet20", (60.0, 65.0))):
        for method, end in zip(("NONE", "KD"), ends, strict=True):
            pairs = ("DISTILLER.STUDENT", student, "DISTILLER.TYPE", method)
            for seed in (0, 1):
                folder = tmp_path / f"{method} {student},seed:{seed}"
                make_run(folder, [end + seed], *pairs, seed=seed)
    report = build_report([tmp_path])
    small, large = "NONE resnet8", "NONE resnet20"
    assert rows(report, "Accuracy").keys() == {small, "KD resnet8", large, "KD resnet20"}
    for base, name, gap in ((small, "KD resnet8", 2.0), (large, "KD resnet20", 5.0)):
        shown = rows(report, f"Differences to the baseline, {base}")
        assert {key: row[1] for key, row in shown.items()} == {name: f"+{gap:.2f} ± 0.00"}
        (line,) = [row for row in report.numbers if row["group"] == name]
        assert line["last_difference"] == pytest.approx(gap)
        (curve,) = [s for s in report.sections if s.title == f"Learning curves, {base}"]
        assert {line.name for line in curve.charts[0].lines} == {base, name}
        assert not any("Not drawn" in note for note in curve.notes)
    assert "Baselines: NONE resnet8; NONE resnet20." in report.lead


@pytest.mark.parametrize(
    "changes",
    [
        ("DISTILLER.STUDENT_ARGS", {"num_filters": [4, 4, 4, 4]}),
        ("DATASET.IMAGE_SIZE", 16),
        ("DATASET.VAL_SPLIT", 10, "DATASET.VAL_SEED", 3),
    ],
)
def test_another_network_or_other_images_are_no_baseline(tmp_path, changes):
    base = ("DATASET.VAL_SPLIT", 10) if "DATASET.VAL_SPLIT" in changes else ()
    make_run(tmp_path / "plain", [70.0], *METHODS["plain"], *base)
    make_run(tmp_path / "kd", [71.0], *METHODS["KD"], *changes)
    assert find_baselines(group(read_runs([tmp_path])), None) == []
    report = build_report([tmp_path], "plain")
    assert rows(report, "Differences to the baseline") == {}


def test_a_baseline_that_was_trained_otherwise_is_told(tmp_path):
    make_run(tmp_path / "plain", [70.0], *METHODS["plain"])
    make_run(tmp_path / "kd", [71.0], *METHODS["KD"], "SOLVER.EPOCHS", 30, "DATASET.MIXUP", 1.0)
    note = "kd was trained otherwise as well: "
    note += "SOLVER.EPOCHS 30 against 10, DATASET.MIXUP 1.0 against 0.0."
    (section,) = [s for s in build_report([tmp_path]).sections if s.title.startswith("Differences")]
    assert note in section.notes


def test_how_a_teachers_file_is_spelled_parts_no_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, file in enumerate(("t/best", "./t/best", str(tmp_path / "t" / "best"))):
        words = (*METHODS["KD"], "DISTILLER.TEACHER_CKPT", file, "SOLVER.RANK_TIMEOUT", 1.0 + seed)
        make_run(tmp_path / f"kd,seed:{seed}", [70.0], *words, seed=seed)
    assert len(group(read_runs([tmp_path]))) == 1
    other = (*METHODS["KD"], "DISTILLER.TEACHER_CKPT", "other")
    make_run(tmp_path / "kd,seed:3", [70.0], *other, seed=3)
    assert len(group(read_runs([tmp_path]))) == 2


def test_runs_with_a_teacher_for_each_seed_are_a_group(tmp_path):
    for seed in (0, 1, 12):
        file = f"out/teacher-seed={seed}/student_latest"
        words = (*METHODS["KD"], "DISTILLER.TEACHER_CKPT", file)
        make_run(tmp_path / f"kd,seed:{seed}", [70.0], *words, seed=seed)
    assert len(group(read_runs([tmp_path]))) == 1
    crossed = (*METHODS["KD"], "DISTILLER.TEACHER_CKPT", "out/teacher-seed=1/student_latest")
    make_run(tmp_path / "kd,seed:2", [70.0], *crossed, seed=2)
    assert len(group(read_runs([tmp_path]))) == 2


def test_runs_with_several_teachers_are_told_apart_by_these_alone(tmp_path, monkeypatch):
    """However files are spelled, by the seed's own, and whatever DISTILLER.TEACHER says."""
    monkeypatch.chdir(tmp_path)
    for seed, file in enumerate(("t-seed=0", str(tmp_path / "t-seed=1"), "t-seed=0")):
        entries = [{"NAME": "resnet8", "CKPT": file}, {"NAME": "resnet20"}]
        words = ("DISTILLER.TEACHERS", entries, "DISTILLER.TEACHER_ARGS", {"width": seed})
        make_run(tmp_path / f"kd,seed:{seed}", [70.0], *METHODS["KD"], *words, seed=seed)
    assert [len(one.runs) for one in group(read_runs([tmp_path]))] == [2, 1]


def test_one_folder_of_images_is_one_data_set_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, root in enumerate(("images", str(tmp_path / "images"))):
        make_run(tmp_path / f"KD,seed:{seed}", [70.0], "DATASET.ROOT", root, seed=seed)
    assert len(group(read_runs([tmp_path]))) == 1


# The report


def test_accuracy_differences_teacher_and_cost(two):
    report = build_report([two])
    assert rows(report, "Accuracy") == {
        "plain": ["3", "71.0 ± 2.5", "72.0 ± 2.5", "test set"],
        "KD": ["3", "73.0 ± 5.0", "74.0 ± 5.0", "test set"],
    }
    assert rows(report, "Differences to the baseline") == {
        "KD": ["not told apart", "+2.0 ± 2.5", "3", "0.0742", "0.0742"]
    }
    assert rows(report, "Teacher and student")["KD"] == [
        *("ResNet50", "80.00", "73.0 ± 5.0", "-7.0 ± 5.0")
    ]
    cost = rows(report, "Cost")["KD"]
    assert cost[:3] == ["6.0", "500", "10"]
    best = build_report([two], "KD", "best")
    assert rows(best, "Differences to the baseline")["plain"][1] == "-2.0 ± 2.5"


def test_the_result_comes_first_and_teachers_stand_apart(two):
    make_run(two / "teacher", [80.0], "DISTILLER.STUDENT", "ResNet50", *METHODS["plain"])
    make_run(two / "plain,seed:3", [1.0], *METHODS["plain"], seed=3, finished=False)
    report = build_report([two])
    assert report.lead[0] == (
        "KD 73.0 ± 5.0 % (top-1 on the test set, last epoch, 3 seeds), +2.0 ± 2.5 points over "
        "plain (p = 0.074, not told apart)."
    )
    (chart,) = report.sections[0].means
    assert [(point.name, point.text) for point in chart.points] == [
        *(("KD", "73.0 ± 5.0"), ("plain", "71.0 ± 2.5")),
    ]
    strip = page.place(chart)
    kd, plain = strip.rows
    assert strip.reference == plain.dot < kd.dot
    assert kd.high - kd.low == pytest.approx(2 * (plain.high - plain.low), abs=0.1)
    students, teachers = next(s for s in report.sections if s.title == "Accuracy").tables
    assert [row[0] for row in students.rows] == ["plain", "KD"]
    assert [row[0] for row in teachers.rows] == ["teacher"]
    assert students.numeric == [False, True, True, True, False]
    assert build_report([two], "KD").lead[0].endswith("no group is above the baseline.")
    kinds = {s.title for s in report.sections if not (s.tables or s.charts or s.means)}
    assert kinds == set()


def test_a_table_for_a_paper(two):
    make_run(two / "50% & more", [80.0], "DISTILLER.STUDENT", "ResNet50", *METHODS["plain"])
    report = build_report([two])
    text = latex(report.numbers, "last", report.unit)
    assert text.splitlines()[2:] == [
        *("\\begin{tabular}{lrrrr}", "\\toprule"),
        *("Method & Seeds & top-1 (\\%) & Difference & $p$ \\\\", "\\midrule"),
        *("50\\% \\& more & 1 & $80.00$ & -- & -- \\\\", "\\midrule"),
        "plain & 3 & $71.0 \\pm 2.5$ & -- & -- \\\\",
        "KD & 3 & $\\mathbf{73.0 \\pm 5.0}$ & $+2.0 \\pm 2.5$ & $0.074$ \\\\",
        *("\\bottomrule", "\\end{tabular}"),
    ]


def test_held_out_images_are_kept_apart_from_the_test_set(tmp_path):
    for seed in (0, 1):
        pairs = ("DATASET.VAL_SPLIT", 500)
        make_run(tmp_path / f"x,seed:{seed}", [60.0, 55.0], *pairs, seed=seed, test=(51.0, 58.0))
    report = build_report([tmp_path])
    assert rows(report, "Accuracy")["x"] == [
        *("2", "51.00 ± 0.00", "58.00 ± 0.00", "500 held-out training images"),
        *("55.00 ± 0.00", "60.00 ± 0.00"),
    ]
    assert "is too high a number" not in markdown(report)
    (section,) = (s for s in report.sections if s.title == "Learning curves")
    assert section.charts[0].title == "Accuracy on held-out images"


def test_runs_without_labels_are_compared_by_their_knn_accuracy(tmp_path):
    """Of every second epoch, by LOG.PROBE_FREQ 2; the loss stands beside that of training."""
    for name, best in (("a", 60.0), ("b", 70.0)):
        pairs = ("DATASET.TYPE", "images", "SOLVER.LR", best)
        folder = make_run(tmp_path / name, [50.0, 55.0, 58.0, best], *pairs)
        summary = json.loads((folder / "summary.json").read_text())
        summary = {key.replace("_acc", "_knn"): value for key, value in summary.items()}
        (folder / "summary.json").write_text(json.dumps(summary | {"last_knn": best - 1}))
        log = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for row in lines:
            del row["train_acc"]
            accuracy = row.pop("test_acc")
            row |= {"test_knn": accuracy} if row["epoch"] % 2 == 0 else {}
        log.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    report = build_report([tmp_path])
    assert rows(report, "Accuracy")["b"][:3] == ["1", "69.00", "70.00"]
    assert "last epoch, test k-NN %" in markdown(report)
    assert rows(report, "Convergence")["b"][:2] == ["1 of 1", "4.00"]  # to 0.95 * 69
    sections = {section.title: section for section in report.sections}
    (chart,) = sections["Learning curves"].charts
    assert chart.title.startswith("k-NN accuracy")
    (line,) = [line for line in chart.lines if line.name == "b"]
    assert line.mean == pytest.approx([math.nan, 55.0, math.nan, 70.0], nan_ok=True)
    assert page.draw(chart).curves[0].path.count("L") == 1  # through both points
    terms = [line.name for line in sections["Training loss"].charts[0].lines]
    assert terms == ["all terms", "loss_ce", "loss_kd", "all terms, on the test set"]


def test_one_run_is_enough(tmp_path):
    folder = make_run(tmp_path / "x", [50.0, 60.0])
    report = build_report([folder])
    assert rows(report, "Accuracy")["x"][:2] == ["1", "60.00"]
    text = markdown(report)
    assert "One seed has no interval" in text
    assert text.splitlines()[2] == "x 60.00 % (top-1 on the test set, last epoch, one seed)."
    assert page.page(report).count("<svg viewBox") >= 4


def test_convergence_counts_epochs_and_seconds_to_the_goal(two):
    found = rows(build_report([two], reach=73.0), "Convergence")
    assert found["plain"] == ["1 of 3", "2.00", "4.0"]  # 72 + 1 in the second epoch, 2 s each
    assert found["KD"] == ["2 of 3", "2.00 ± 0.00", "4.0"]
    groups = group(read_runs([two]))
    assert curves.goal(groups, find_baselines(groups, "plain")[0], None) == pytest.approx(0.95 * 71)
    assert curves.reached(groups[0].runs[0], 99.0) is None


def test_all_groups_have_their_mean_drawn_and_the_first_ten_their_curves(tmp_path):
    for k in range(12):
        make_run(tmp_path / f"run {k}", [70.0, 71.0 + k], "SOLVER.LR", 0.1 + k)
    sections = {section.title: section for section in build_report([tmp_path]).sections}
    assert len(sections["Means"].means[0].points) == 12
    assert {len(chart.lines) for chart in sections["Learning curves"].charts} == {10}
    assert "Of 12 groups the first 10 of the table are drawn." in sections["Learning curves"].notes


def test_curves_are_means_with_the_lowest_and_the_highest(two):
    report = build_report([two])
    (section,) = (s for s in report.sections if s.title == "Learning curves")
    line = section.charts[0].lines[1]
    assert (line.name, line.mean, line.low, line.high) == (
        *("KD", [20.0, 74.0, 73.0]),
        *([20.0, 72.0, 71.0], [20.0, 76.0, 75.0]),
    )
    long = make_run(two / "long", [float(epoch) for epoch in range(1, 21)], "SOLVER.LR", 0.2)
    half = curves.learning(group(read_runs([two]))).charts[1]
    assert (half.title, half.start) == ("Accuracy on the test set, second half", 10)
    assert [(line.name, line.mean[0]) for line in half.lines] == [(long.name, 10.0)]
    (terms,) = (s for s in report.sections if s.title == "Training loss")
    kd = next(chart for chart in terms.charts if chart.title == "KD")
    assert [line.name for line in kd.lines] == ["all terms", "loss_ce", "loss_kd"]
    assert kd.lines[2].mean == pytest.approx([0.4, 0.2, 0.4 / 3])


def test_curves_go_by_epoch_where_a_line_is_lost(two):
    (kd,) = [g for g in group(read_runs([two])) if g.name == "KD"]
    del kd.runs[0].epochs[1]
    assert len(kd.curve("test_acc")) == 1


def test_two_keys_on_a_grid_make_a_heat_map(tmp_path):
    make_run(tmp_path / "plain", [1.0], *METHODS["plain"])
    for beta in (1, 2, 8):
        for t in (1, 4):
            pairs = ("DISTILLER.TYPE", "DKD", "DKD.BETA", beta, "DKD.T", t)
            if (beta, t) != (8, 1):
                make_run(tmp_path / f"DKD,BETA={beta},T={t}", [10.0 * beta + t], *pairs)
    (grid,) = grids(group(read_runs([tmp_path])))
    assert (grid.keys, grid.axes) == (("DKD.BETA", "DKD.T"), ([1, 2, 8], [1, 4]))
    report = build_report([tmp_path])
    table = next(s for s in report.sections if s.title == "Ablations").tables[0]
    assert table.head == ["", "DKD.T 1", "DKD.T 4"]
    assert table.rows[0] == ["DKD.BETA 1", "11.00 (1)", "14.00 (1)"]
    assert table.rows[2] == ["DKD.BETA 8", "-", "84.00 (1)"]
    assert [page.shade(table, 0, 1), page.shade(table, 2, 2), page.shade(table, 2, 1)] == [
        0,
        4,
        None,
    ]
    assert '<td class="s4">84.00 (1)</td>' in page.page(report)
    assert "chooses on the test set" in markdown(report)


def test_settings_are_ranked_and_shaded_by_held_out_images(tmp_path):
    ends = {(1, 1): (60.0, 40.0), (1, 2): (61.0, 42.0), (2, 1): (50.0, 55.0), (2, 2): (51.0, 54.0)}
    for (beta, t), (held_out, test) in ends.items():
        pairs = (*("DISTILLER.TYPE", "DKD", "DKD.BETA", beta, "DKD.T", t), "DATASET.VAL_SPLIT", 500)
        make_run(tmp_path / f"DKD,BETA={beta},T={t}", [held_out], *pairs, test=(test, test))
    report = build_report([tmp_path])
    assert next(iter(rows(report, "Accuracy"))) == "DKD,BETA=1,T=2"
    assert "Groups are in the order of their held-out accuracy." in markdown(report)
    (section,) = [s for s in report.sections if s.title == "Ablations"]
    assert section.tables[0].rows[0] == ["DKD.BETA 1", "60.00 (1)", "61.00 (1)"]
    assert section.notes == [
        "top-1 % on the held-out images, last epoch, mean over seeds (their number)."
    ]


def test_axes_enclose_the_values_with_round_numbers():
    assert page.nice_ticks(0.0, 97.3) == [0, 20, 40, 60, 80, 100]
    assert page.nice_ticks(0.5, 0.5)[0] <= 0.5 < page.nice_ticks(0.5, 0.5)[-1]
    assert page.whole_ticks(1, 240) == (1, 50, 100, 150, 200, 240)
    assert page.whole_ticks(1, 2) == (1, 2)
    assert page.whole_ticks(30, 60) == (30, 35, 40, 45, 50, 55, 60)
    line = Line("x", [1.0, math.nan, 3.0], [1.0, math.nan, 3.0], [1.0, math.nan, 3.0])
    (curve,) = page.draw(Chart("t", "u", [line])).curves
    assert "nan" not in curve.path


def test_numbers_for_a_spreadsheet_are_not_rounded(two):
    plain, kd = csv.DictReader(io.StringIO(csv_table(build_report([two]).numbers)))
    assert float(kd["p"]) == stats.ttest_rel(ENDS["KD"], ENDS["plain"]).pvalue
    assert (plain["p"], plain["group"], kd["failed"]) == ("", "plain", "0")


# What did not finish


def test_unfinished_and_damaged_runs_are_listed(two):
    make_run(two / "KD,seed:3", [40.0], *METHODS["KD"], seed=3, finished=False)
    (two / "KD,seed:3" / "metrics.jsonl").open("a").write('{"epoch": 2, "test_')
    cut = make_run(two / "KD,seed:4", [40.0, 50.0], *METHODS["KD"], seed=4)
    (cut / "summary.json").write_text('{"last_acc": 5')
    (two / "broken").mkdir()
    (two / "broken" / "config.yaml").write_text("A: [")
    (two / "original").mkdir()
    (two / "original" / "worklog.txt").write_text("best_acc\t70.1")
    report = build_report([two])
    assert rows(report, "Accuracy")["KD"][0] == "3"
    listed = next(s for s in report.sections if s.title == "Runs").tables[0].rows
    states = {Path(row[-1]).name: row[2] for row in listed}
    assert states["KD,seed:3"] == "unfinished: after epoch 1 of 10"
    assert states["KD,seed:4"] == "unfinished: after epoch 2 of 10"
    assert states["broken"] == "unfinished: config.yaml is damaged"
    assert states["original"].startswith("unfinished: no config.yaml")
    counts = "10 runs in 4 groups that differ in more than the seed: 6 finished, 4 unfinished."
    assert counts in report.lead


def test_a_run_that_fails_records_why(tmp_path, monkeypatch):
    def fail(self, trainer, epoch, record):
        raise failure

    monkeypatch.setattr(Evaluate, "after_epoch", fail)
    expected = {
        RuntimeError("no\nmemory"): ("failed", "RuntimeError: no memory (after epoch 0 of 2)"),
        KeyboardInterrupt(): ("unfinished", "after epoch 0 of 2, interrupted"),
    }
    for number, failure in enumerate(expected):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = ["--cfg", str(write_config(folder))]
        with contextlib.suppress(RuntimeError):
            train_command.main(words)
        (run,) = read_runs([folder])
        assert (run.state, run.why) == expected[failure]


def test_a_real_sweep_with_a_failure(tmp_path, capsys):
    toy = json.dumps(str(REPO / "tests" / "sweep" / "sweep_toy.py"))
    write_config(tmp_path, f"IMPORTS: [{toy}]\n", method="LOGGED", student="Dot", epochs=3)
    (tmp_path / "s.yaml").write_text(
        "SWEEP: s\nCONFIG: toy.yaml\nSEEDS: 2\n"
        "VARIANTS: [{NAME: bad, OVERRIDES: {LOGGED.FAIL: True}}, {NAME: good},\n"
        "  {NAME: wild, OVERRIDES: {SOLVER: {LR: 1.0e+30, SCHEDULE: constant}}}]\n"
    )
    out = tmp_path / "out"
    words = ["--cfg", str(tmp_path / "s.yaml"), "--out", str(out), "--jobs", "1"]
    assert sweep_command.main(words) == 1
    report = build_report([out])
    listed = next(s for s in report.sections if s.title == "Runs").tables[0].rows
    states = {Path(row[-1]).name: (row[0], row[1], row[2]) for row in listed}
    assert len(states) == 6
    why = "failed: RuntimeError: this method fails, on purpose"
    assert states["bad-seed=1"] == ("bad", "1", why)
    assert states["wild-seed=0"][2].startswith("failed: non-finite loss in epoch 1")
    good = [
        json.loads((out / "toy" / f"good-seed={s}" / "summary.json").read_text()) for s in (0, 1)
    ]
    mean = (good[0]["last_acc"] + good[1]["last_acc"]) / 2
    (numbers,) = (row for row in report.numbers if row["group"] == "good")
    assert numbers["last_mean"] == pytest.approx(mean)
    assert rows(report, "Made with")
    (out / "study.db").unlink()  # with a study in another database: the logs tell
    lost = {run.folder.name: run for run in read_runs([out])}
    assert len(lost) == 6
    assert lost["bad-seed=1"].state == lost["wild-seed=1"].state == "failed"
    assert lost["bad-seed=1"].why.endswith("on purpose (before it began)")
    assert good[0]["peak_memory_of"] == "process"
    assert 50 < good[0]["peak_memory_mib"] < 50_000


# Published numbers


def test_every_published_line_is_well_formed_and_there_once():
    with (REPO / "docs" / "results" / "published.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == [field.name for field in fields(Published)]
    for line in lines:
        assert len(line) == len(reader.fieldnames), line
        assert None not in line.values(), line
        assert line["dataset"] in ("cifar10", "cifar100", "imagenet")
        assert line["type"] in distiller_dict, line
        assert line["verified"] in ("yes", "no"), line
        assert all((line["student"], line["method"], line["source"])), line
        assert bool(line["teacher"]) == (line["type"] not in ("NONE", "USKD")), line
        assert 40 < float(line["top1"]) < 100, line
        assert len(line["top1"]) == 5, line
    names = ("dataset", "method", "type", "teacher", "student", "source")
    counts = Counter(tuple(line[name] for name in names) for line in lines)
    assert [key for key, count in counts.items() if count > 1] == []
    assert len(published()) == len(lines)


def pair(method, *pairs, teacher="resnet32x4", student="resnet8x4"):
    networks = ("DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student)
    return flat(config("DISTILLER.TYPE", method, *networks, "SOLVER.EPOCHS", 240, *pairs))


def test_a_run_finds_what_is_published_for_it():
    def found(*words, **names):
        return [(line.method, line.top1) for line in published_for(pair(*words, **names))]

    assert found("DKD") == [("DKD", 76.32)]
    assert found("DKD", "LSKD.ENABLE", True) == [("LSKD-DKD", 77.01)]
    assert found("SDD", "SDD.BASE", "KD") == [("SD-KD", 76.63)]
    assert found("NONE", student="vgg8", teacher="vgg13") == [("student", 70.36)]
    assert found("DKD", "DATASET.TYPE", "cifar10") == []
    assert found("DKD", "SOLVER.TRAINER", "dot") == []
    assert found("DKD", "DKD.DIVERGENCE", "reverse_kl") == []
    weights = [f"WKD.LOSS.WKD_{part}_WEIGHT" for part in ("LOGIT", "FEAT")]
    assert found("WKD") == [("WKD-L", 76.53)]
    assert found("WKD", weights[1], 0.1) == [("WKD-F", 76.77)]
    assert found("WKD", weights[0], 1.0, weights[1], 0.1) == [("WKD-LF", 77.28)]
    assert found("KD", "SOLVER.TRAINER", "crd") == [("KD", 73.33)]
    assert found("DKD", teacher="resnet8x4", student="resnet32x4") == []


def _pair(line):
    return line.teacher, line.student


def test_a_shipped_config_has_the_protocol_of_its_published_line(monkeypatch):
    """Also MLKD's, of 480 and 960 epochs. Of the Knowledge-Distillation-Zoo little is known."""
    cache_yaml(monkeypatch)
    seen, others, load = 0, {}, functools.cache(load_config)
    monkeypatch.setattr("mdistiller.report.published.load_config", load)
    shipped = (_configs(one.dataset, one.type).get(_pair(one), ()) for one in published())
    for path in sorted(set(itertools.chain(*shipped))):
        settings = flat(load(path))
        for line in published_for(settings):
            seen += 1
            if named := departures(settings, line):
                others[path.relative_to(REPO / "configs").as_posix()] = named
    assert seen > 200
    assert others.pop("cifar100/ctkd/res32x4_res8x4_dkd.yaml")  # beside CTKD on KD
    zoo = ("teacher", "self_distillation/res20", "self_distillation/res110")
    assert set(others) == {f"cifar10/{name}.yaml" for name in zoo}


def test_another_protocol_is_named():
    def shipped(*changes, name="cifar100/dkd/res32x4_res8x4"):
        return flat(load_config(f"configs/{name}.yaml", list(changes)))

    (line,) = published_for(shipped())
    for _ in range(2):  # what is remembered of the shipped config stays as it is
        assert departures(shipped(), line, processes=2) == ["images a step 128 instead of 64"]
    other = ("SOLVER.EPOCHS", 10, "SOLVER.ACCUMULATE", 2, "DATASET.VAL_SPLIT", 5000)
    assert sorted(departures(shipped(*other), line)) == [
        "5000 training images held out to select the epoch; published: the test set",
        "epochs 10 instead of 240",
        "images a step 128 instead of 64",
    ]
    other = ("SOLVER.LR", 0.1, "DKD.BETA", 2.0, "DATASET.MIXUP", 1.0, "LOG.TENSORBOARD_FREQ", 7)
    assert sorted(departures(shipped(*other), line)) == [
        "DATASET.MIXUP 1.0 instead of 0.0",
        "DKD.BETA 2.0 instead of 8.0",
        "lr 0.1 instead of 0.05",
    ]
    other = shipped("DISTILLER.STUDENT_ARGS", {"num_filters": [1, 1, 1, 1]})
    assert departures(other, line) == [
        "DISTILLER.STUDENT_ARGS.num_filters [1, 1, 1, 1] instead of the default"
    ]
    large = shipped("SOLVER.LR", 3.0, name="imagenet/r34_r18/kd")
    assert all("lr 3.0 instead of 0.2" in departures(large, line) for line in published_for(large))
    alone = flat(load_config("configs/cifar100/vanilla.yaml", ["DISTILLER.STUDENT", "vgg8"]))
    (line,) = published_for(alone)
    assert departures(alone, line) == [
        "other settings were not compared: no config of this line is shipped"
    ]


def test_the_report_sets_a_run_beside_its_published_number(tmp_path):
    networks = ("DISTILLER.TEACHER", "resnet32x4", "DISTILLER.STUDENT", "resnet8x4")
    make_run(tmp_path / "DKD", [75.0, 74.0], "DISTILLER.TYPE", "DKD", *networks)
    report = build_report([tmp_path])
    found = rows(report, "Beside published numbers")["DKD"]
    assert found[:5] == ["74.00", "75.00", "76.32", "-1.32", "DKD"]
    assert found[5] == "DKD (arXiv 2203.08679)"
    told = found[6].split("; ")
    assert {"epochs 10 instead of 240", "weight_decay 0.0001 instead of 0.0005"} <= set(told)


def test_no_cell_of_a_table_is_a_formula():
    rows = [{"name": "=1+2", "other": "-x", "number": -1.5}, {"name": "@a", "number": None}]
    lines = csv_table(rows).splitlines()
    assert lines == ["name,other,number", "'=1+2,'-x,-1.5", "'@a,,"]


def test_a_teachers_longer_run_squeezes_no_curve(tmp_path):
    rising = [float(n) for n in range(10, 20)]
    make_run(tmp_path / "plain", rising, "DISTILLER.TYPE", "NONE")
    make_run(tmp_path / "kd", rising, "DISTILLER.TYPE", "KD")
    teacher = ("DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", "resnet56")
    make_run(tmp_path / "teacher", rising * 4, *teacher)
    found = build_report([tmp_path], "plain")
    (section,) = [s for s in found.sections if s.title == "Learning curves"]
    half = section.charts[1]
    assert half.title == "Accuracy on the test set, second half"
    assert half.start == 5
    assert {line.name for line in half.lines} == {"plain", "kd"}
    assert section.notes[-1] == "Not drawn, as they do not compare with plain: teacher."
    assert all(len(line.mean) == 6 for line in half.lines)
