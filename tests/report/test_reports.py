"""Reports: tables, charts, what did not finish, nothing left out."""

import contextlib
import csv
import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from report_runs import ENDS, METHODS, make_run, rows
from scipy import stats
from support import REPO, write_config

from mdistiller.cli import sweep as sweep_command
from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks.default import Evaluate
from mdistiller.files.tables import csv_table
from mdistiller.report import curves, page
from mdistiller.report.build import build_report
from mdistiller.report.document import Chart, Line, Mean, Means, Report, Section, markdown
from mdistiller.report.groups import find_baselines, grids, group
from mdistiller.report.latex import latex
from mdistiller.report.runs import read_runs


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


@pytest.mark.parametrize("means", [(97.3, 99.9), (97.11, 97.34), (10.0, 99.0), (5.0, 5.0)])
def test_numbers_at_the_axis_of_means_stand_apart_on_a_telephone(means):
    """On 112 pixels, the least width of that column; a digit of 11 pixels has about 6.2."""
    points = [Mean(f"p{number}", mean, 0.01, "") for number, mean in enumerate(means)]
    text = page.page(Report("t", [], [Section("s", means=[Means("m", points)])], []))
    labels = re.findall(r'<text x="([\d.]+)%" y="13" text-anchor="middle">([^<]+)</text>', text)
    places = [(float(x) * 1.12, 6.2 * len(label) / 2) for x, label in labels]
    assert len(places) >= 2
    for (left, half), (right, other) in itertools.pairwise(places):
        assert right - left > half + other + 4


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
