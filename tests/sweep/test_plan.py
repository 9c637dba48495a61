"""The trials of a sweep file, and what is wrong with one."""

import re
from pathlib import Path

import pytest
from support import REPO, cache_yaml
from sweep_runs import names, words

from mdistiller.cli import sweep as command
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.registry import UserError
from mdistiller.sweep.fields import with_seed
from mdistiller.sweep.plan import read_plan

SHIPPED = [p for p in sorted((REPO / "configs").rglob("*.yaml")) if "\nSWEEP:" in p.read_text()]


def test_a_grid_is_variants_times_axes_times_seeds(sweep):
    path = sweep(
        "OVERRIDES: {SOLVER: {EPOCHS: 3}}\nSEEDS: [4, 7]\n"
        "VARIANTS:\n"
        "- {NAME: plain, CONFIG: other.yaml, OVERRIDES: {SOLVER.EPOCHS: 5}}\n"
        "- {NAME: KD, OVERRIDES: {DISTILLER: {TYPE: KD}}, GRID: {KD.TEMPERATURE: [1, 1e-1]}}\n"
        "GRID: {SOLVER.TYPE: [SGD, Adam]}\n",
        TEACHER="Dot",
        TEACHER_CFG="toy.yaml",
    )
    (path.parent / "other.yaml").write_text("_BASE_: toy.yaml\nSOLVER: {LR: 0.3}\n")
    plan = read_plan(path, ["SOLVER.MOMENTUM", "0.5"], out=sweep.out)
    cells = ["plain,SGD", "plain,Adam"]
    cells += [f"KD,{kind},TEMPERATURE={t}" for kind in ("SGD", "Adam") for t in (1, 0.1)]
    assert names(plan) == [f"{cell},seed:{seed}" for cell in cells for seed in (4, 7)]
    first, last = plan.trials[0].configs[0], plan.trials[-1].configs[0]
    assert (first.SOLVER.LR, first.SOLVER.EPOCHS, first.SOLVER.TYPE) == (0.3, 5, "SGD")
    assert (last.SOLVER.LR, last.SOLVER.EPOCHS, last.SOLVER.TYPE) == (0.05, 3, "Adam")
    assert (last.DISTILLER.TYPE, last.KD.TEMPERATURE, last.EXPERIMENT.SEED) == ("KD", 0.1, 7)
    assert first.SOLVER.MOMENTUM == last.SOLVER.MOMENTUM == 0.5
    assert str(sweep.out) == last.LOG.PREFIX


def test_text_of_a_sweep_is_kept_as_it_is_written(sweep):
    path = sweep(
        "VARIANTS: [{NAME: 010, OVERRIDES: {LOGGED.GATE: 1.10, SOLVER.EPOCHS: 3}}]\n"
        "GRID: {EXPERIMENT.TAG: [2024_11_29, 1e-3, no], SOLVER.LR: [1, 1e-3]}\nSEEDS: [1]\n"
    )
    trials = read_plan(path).trials
    tags = ["2024_11_29", "1e-3", "no"]
    assert [trial.name for trial in trials] == [
        f"010,{tag},LR={lr},seed:1" for tag in tags for lr in (1, 0.001)
    ]
    fixed = ["LOGGED.GATE", "1.10", "SOLVER.EPOCHS", 3]
    assert trials[0].changes == [*fixed, "EXPERIMENT.TAG", "2024_11_29", "SOLVER.LR", 1]
    assert type(trials[0].changes[3]) is int
    assert [trial.configs[0].EXPERIMENT.TAG for trial in trials[::2]] == tags
    axes = "TRIALS: 2\nSPACE: {EXPERIMENT.TAG: [0.1, 1e-1, 010], SOLVER.LR: {LOW: 1, HIGH: 2}}\n"
    assert read_plan(sweep(axes)).space["EXPERIMENT.TAG"] == ("0.1", "1e-1", "010")


def test_a_run_can_start_from_the_student_of_its_own_seed(sweep, capsys):
    start = sweep.folder / "start-{seed}"
    path = sweep(f"SEEDS: [4, 7]\nOVERRIDES: {{DISTILLER: {{STUDENT_CKPT: '{start}'}}}}\n")
    files = [sweep.folder / f"start-{seed}" for seed in (4, 7)]
    files[0].touch()
    assert command.main([*words(path), "--dry-run"]) == 2
    assert f"{files[1]} does not exist" in capsys.readouterr().err
    files[1].touch()
    trials = read_plan(path, out=sweep.out).trials
    assert [trial.configs[0].DISTILLER.STUDENT_CKPT for trial in trials] == [*map(str, files)]
    search = path.read_text() + "TRIALS: 1\nSPACE: {SOLVER.LR: {LOW: 0.1, HIGH: 0.2}}\n"
    path.write_text(search)
    (trial,) = read_plan(path, out=sweep.out).trials
    assert [cfg.DISTILLER.STUDENT_CKPT for cfg in trial.configs] == [*map(str, files)]


def test_configs_of_teachers_are_found_beside_the_file(sweep, monkeypatch):
    """Also with the run's seed in their names, among several teachers, and on an axis."""
    text = "SEEDS: [4, 7]\nOVERRIDES: {DISTILLER: {TYPE: KD, TEACHER: Dot, %s}}\n%s"
    for name in ("t-4.yaml", "t-7.yaml"):
        (sweep.folder / name).write_text("_BASE_: toy.yaml\n")
    files = [str(sweep.folder / f"t-{seed}.yaml") for seed in (4, 7)]
    for place in (sweep.folder, sweep.folder.parent):
        monkeypatch.chdir(place)
        path = sweep(text % ("TEACHER_CFG: 't-{seed}.yaml'", ""))
        nodes = [trial.configs[0].DISTILLER for trial in read_plan(path).trials]
        assert [node.TEACHER_CFG for node in nodes] == files
    path = sweep(text % ("TEACHERS: [{NAME: Dot, CFG: 't-{seed}.yaml'}]", ""))
    nodes = [trial.configs[0].DISTILLER for trial in read_plan(path).trials]
    assert [node.TEACHERS[0]["CFG"] for node in nodes] == files
    path = sweep(text % ("COMBINE: losses", "GRID: {DISTILLER.TEACHER_CFG: [t-4.yaml, t-7.yaml]}"))
    nodes = [trial.configs[0].DISTILLER for trial in read_plan(path).trials]
    assert [node.TEACHER_CFG for node in nodes[::2]] == files


def test_the_seed_of_a_run_stands_in_lists_too_and_an_axis_without_values_is_named(sweep, capsys):
    given = ["A", [{"CKPT": "x-{seed}"}, 3], "B", "{seed}"]
    assert with_seed(given, 7) == ["A", [{"CKPT": "x-7"}, 3], "B", "7"]
    assert command.main([*words(sweep("GRID: {SOLVER.LR: []}\n")), "--dry-run"]) == 2
    assert "GRID: SOLVER.LR must be a list of values, got []" in capsys.readouterr().err


def test_all_methods_are_those_registered_now(sweep, monkeypatch):
    cache_yaml(monkeypatch)
    path = sweep("GRID: {DISTILLER.TYPE: all}\n", TEACHER="Dot", TEACHER_CFG="toy.yaml")
    monkeypatch.setitem(distiller_dict, "BRANDNEW", distiller_dict["KD"])
    cells = {trial.cell for trial in read_plan(path).trials}
    assert cells == set(distiller_dict)
    assert "BRANDNEW" in cells


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(REPO).as_posix())
def test_every_shipped_sweep_can_be_planned(path, monkeypatch):
    cache_yaml(monkeypatch)
    for module in ("start", "teacher_weights"):  # files of weights are the user's
        place = f"mdistiller.networks.{module}.find_file"
        monkeypatch.setattr(place, lambda cfg, key: Path(cfg.DISTILLER[key]))
    text = path.read_text()
    if "MODE:" in text and "MODE" not in default_config().DKD:
        pytest.skip("DKD.MODE is not there yet")
    plan = read_plan(path)
    assert len(plan.trials) >= 2
    with pytest.raises(UserError, match=r"is a sweep: run it with tools/sweep\.py"):
        load_config(path)


def test_the_guides_examples_can_be_planned(tmp_path, monkeypatch):
    cache_yaml(monkeypatch)
    guide = (REPO / "docs" / "sweeps.md").read_text()
    plans = []
    for text in re.findall(r"```yaml\n(SWEEP.*?)```", guide, re.DOTALL):
        (tmp_path / "s.yaml").write_text(text)
        plans.append(read_plan(tmp_path / "s.yaml"))
    assert [len(plan.trials) for plan in plans] == [2 * (1 + 2) * 3, 40]
    assert plans[0].trials[-1].name == "KD,LR=0.1,TEMPERATURE=4,seed:2"


def test_dry_run_prints_the_trials_and_leaves_nothing(sweep, capsys):
    path = sweep("GRID: {SOLVER.LR: [0.1, 0.2]}\nSEEDS: 2\n")
    assert command.main([*words(path), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "LR=0.1,seed:0  SOLVER.LR 0.1"
    assert out[-1].startswith("4 trials, 4 runs; ")
    assert not sweep.out.exists()


BAD = {
    "GRDI: {}": "unknown sweep key GRDI; did you mean 'GRID'?",
    "GRID: {SOLVER.LRR: [1]}": "LRR=1: unknown config key SOLVER.LRR; did you mean 'SOLVER.LR'?",
    "GRID: {SOLVER.LR: 1}": "GRID: SOLVER.LR must be a list of values, got 1",
    "GRID: {SOLVER.LR: [0.1, a]}": "a: SOLVER.LR must be a finite number, got 'a'",
    "GRID: {SOLVER.LR: [0.1, 1e-1]}": "GRID: SOLVER.LR: 0.1 and 1e-1 are the same value",
    "GRID: {SOLVER.EPOCHS: [4, 4.0]}": "GRID: SOLVER.EPOCHS: 4 and 4.0 are the same value",
    "GRID: {SOLVER.EPOCHS: [4, 010]}": "s.yaml, line 3: SOLVER.EPOCHS: YAML reads 010 as 8",
    "TRIALS: 010": "s.yaml, line 3: TRIALS: YAML reads 010 as 8",
    "SEEDS: [1, 1_0]": "s.yaml, line 3: SEEDS: YAML reads 1_0 as 10",
    "TRIALS: 2\nSPACE: {SOLVER.LR: [.1, 1e-1]}": "SPACE: SOLVER.LR: .1 and 1e-1 are the same value",
    "TRIALS: 2\nSPACE: {SOLVER.LR: [4, 4.0]}": "SPACE: SOLVER.LR: 4 and 4.0 are the same value",
    "TRIALS: 2\nSPACE: {SOLVER.LR: {LOW: 010, HIGH: 11}}": "s.yaml, line 4: SOLVER.LR: YAML reads",
    "GRID: {DISTILLER.TYPE: [KDD]}": "KDD: unknown distiller (DISTILLER.TYPE) 'KDD'; did you mean",
    "GRID: {DISTILLER.TYPE: [KD]}": "KD: no weights for the teacher ResNet50",
    "OVERRIDES: {SOLVER: {TYPE: Adamm}}": "unknown optimizer (SOLVER.TYPE) 'Adamm'; did you mean",
    "OVERRIDES: {EXPERIMENT.SEED: 3}": "EXPERIMENT.SEED: in a sweep that comes from SEEDS",
    "VARIANTS: [{CONFIG: toy.yaml}]": "VARIANTS: each needs a NAME",
    "VARIANTS: [{NAME: a, GIRD: 1}]": "variant a: unknown sweep key GIRD; did you mean 'GRID'?",
    "VARIANTS: [{NAME: a, CONFIG: b.yaml}]": "a: config file 'b.yaml' not found",
    "VARIANTS: [{NAME: a/b}, {NAME: a_b}]": "toy/a_b-seed=0",
    "SEEDS: none": "SEEDS must be their number or a list of whole numbers, got 'none'",
    "SEEDS: [1, 1]": "SEEDS [1, 1] has one twice",
    "SEEDS: 0": "SEEDS must be their number",
    "METRIC: last_ac": "METRIC 'last_ac' must be one of last_acc, best_acc",
    "METRIC: test_acc_last": "needs held-out images: set DATASET.VAL_SPLIT",
    "TRIALS: 3": "TRIALS belongs to a search: add SPACE",
    "SPACE: {SOLVER.LR: [1]}": "SPACE needs TRIALS",
    "TRIALS: 2\nSPACE: {SOLVER.LR: {LOW: 1, HIGH: 0.1}}": "LOW 1.0 is not below HIGH 0.1",
    "TRIALS: 2\nSPACE: {SOLVER.LR: {LOW: -1, HIGH: 1}}": "SOLVER.LR must be positive, got -1",
    "TRIALS: 2\nSPACE: {SOLVER.LR: {LWO: 1, HIGH: 2}}": "must be a list of values or LOW and HIGH",
    "TRIALS: 2\nSPACE: {SOLVER.EPOCHS: {LOW: 1.5, HIGH: 2}}": "EPOCHS must be a whole number",
    "TRIALS: 2\nSPACE: {SOLVER.LR: [1]}\nGRID: {SOLVER.LR: [1]}": "SPACE and GRID exclude",
    "TRIALS: 2\nSPACE: {SOLVER.LR: [1]}\nMETRIC: test_acc_best": "must not select on the test set",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_sweep_gets_one_line_before_anything_starts(sweep, capsys, text):
    assert command.main(words(sweep(text + "\n"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[text] in line
    assert not sweep.out.exists()


def test_a_teacher_that_cannot_be_is_found_out_before_anything_starts(sweep, capsys):
    path = sweep("GRID: {DISTILLER.TYPE: [NONE, KD]}\n", TEACHER="resnet8", TEACHER_CFG="toy.yaml")
    for more, reason in {
        (): "KD: DISTILLER.TEACHER_CFG trains a Dot, but DISTILLER.TEACHER is resnet8",
        ("DISTILLER.TEACHER_CKPT", "no.pth"): "KD: DISTILLER.TEACHER_CKPT: no.pth does not exist",
    }.items():
        assert command.main([*words(path), *more]) == 2
        assert reason in capsys.readouterr().err


def test_the_command_line_may_not_set_what_the_trials_set(sweep, capsys):
    path = sweep("GRID: {SOLVER.LR: [0.1, 0.2]}\n")
    for key, reason in {
        "SOLVER.LR": "SOLVER.LR: that is an axis of the sweep",
        "LOG.PREFIX": "LOG.PREFIX: in a sweep that comes from --out",
    }.items():
        assert command.main([*words(path), key, "0.3"]) == 2
        assert reason in capsys.readouterr().err
    assert command.main([*words(path), "--jobs", "0"]) == 2
    assert command.main([*words(path), "--table"]) == 2
    assert "no study" in capsys.readouterr().err
    assert command.main([*words(path), "--storage", "oracel://x:secret@y/z"]) == 2
    error = capsys.readouterr().err
    assert "cannot be opened as a database" in error
    assert "secret" not in error
