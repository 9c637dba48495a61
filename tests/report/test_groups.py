"""The statistics of a report, and which runs form a group or are its baseline."""

import math

import pytest
from report_runs import ENDS, METHODS, make_run, rows
from scipy import stats

from mdistiller.registry import UserError
from mdistiller.report.build import build_report
from mdistiller.report.document import markdown
from mdistiller.report.groups import find_baselines, group, varying_keys
from mdistiller.report.numbers import difference, estimate, holm, verdict
from mdistiller.report.runs import read_runs

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
