"""Sweeps: the file's trials, sharing them out, failures, death and resumption, the table."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from support import REPO, cache_yaml, run_script, unpadded, write_config

from mdistiller.cli import sweep as command
from mdistiller.cli import train as train_command
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.registry import UserError
from mdistiller.run import teacher
from mdistiller.sweep import table, trial_state, work
from mdistiller.sweep.fields import with_seed
from mdistiller.sweep.plan import read_plan
from mdistiller.sweep.study import Study
from mdistiller.sweep.trial_state import Status, attempts_by_trial

SHIPPED = [p for p in sorted((REPO / "configs").rglob("*.yaml")) if "\nSWEEP:" in p.read_text()]
forks = "fork" in multiprocessing.get_all_start_methods()
needs_fork = pytest.mark.skipif(not forks, reason="needs fork")
IMPORTS = f"IMPORTS: [{json.dumps(str(REPO / 'tests' / 'sweep' / 'sweep_toy.py'))}]\n"


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep file beside a config of a tiny network; gives its path and the output."""

    def write(text, name="s.yaml", **config):
        settings = {"method": "LOGGED", "student": "Dot", **config}
        write_config(tmp_path, IMPORTS + f"LOGGED:\n  LOG: {tmp_path / 'log'}\n", **settings)
        path = tmp_path / name
        path.write_text(f"SWEEP: s\nCONFIG: toy.yaml\n{text}")
        return path

    write.folder, write.out = tmp_path, tmp_path / "sweep"
    return write


def words(path, *more):
    return ["--cfg", str(path), "--out", str(path.parent / "sweep"), *map(str, more)]


def started(folder):
    """How often each run was begun."""
    return Counter(line.split(" ", 1)[1] for line in (folder / "log").read_text().splitlines())


def names(plan):
    return [trial.name for trial in plan.trials]


# The trials of a file


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


# Sharing out


def claims(path, queue):
    """Takes all trials it can get and says which; a finished one ends at once."""
    plan = read_plan(path, out=path.parent / "sweep")
    study = Study(plan, f"sqlite:///{path.parent / 'study.db'}")
    taken = []
    while waiting := study.open_trials():
        attempt = study.take(waiting[0])
        if attempt is not None:
            taken.append(attempt.trial.name)
            attempt.finish([{"last_acc": 1.0}])
    queue.put(taken)


@needs_fork
def test_processes_in_a_race_never_take_the_same_trial(sweep):
    path = sweep("SEEDS: 4\n")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    racers = [context.Process(target=claims, args=(path, queue)) for _ in range(3)]
    for racer in racers:  # they also create the database all at once
        racer.start()
    taken = [queue.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert Counter(name for names in taken for name in names) == {
        f"s,seed:{seed}": 1 for seed in range(4)
    }


@pytest.fixture
def study(sweep):
    plan = read_plan(sweep("SEEDS: 2\n"), out=sweep.out)
    return Study(plan, f"sqlite:///{sweep.folder / 'study.db'}")


def test_the_later_of_two_attempts_withdraws(study, monkeypatch):
    """Another process enters its attempt after this one has seen none."""
    trial, add = study.plan.trials[0], study._add

    def late(*args):
        monkeypatch.setattr(study, "_add", add)
        rival.append(study.take(trial))
        return add(*args)

    rival = []
    monkeypatch.setattr(study, "_add", late)
    assert study.take(trial) is None
    assert study.status()[trial.name].state == "running"
    rival[0].finish([{"last_acc": 50.0}])
    assert study.status()[trial.name].results == [{"last_acc": 50.0}]
    states = [
        (a.state, a.user_attrs.get("end"))
        for a in attempts_by_trial(study.storage, study.id)[trial.name]
    ]
    assert states == [(TrialState.COMPLETE, None), (TrialState.FAIL, "withdrawn")]


def elsewhere(study, attempt, seconds):
    """Make an attempt that of a process on another machine, silent for some seconds."""
    study.storage.set_trial_user_attr(attempt.id, "place", "elsewhere")
    with sqlite3.connect(study.url.removeprefix("sqlite:///")) as database:
        database.execute(
            f"UPDATE trial_heartbeats SET heartbeat = datetime('now', '-{seconds} seconds')"
        )
    database.close()


def test_another_machines_attempt_is_taken_over_once_it_is_silent(study):
    trial = study.plan.trials[0]
    lost = study.take(trial)
    elsewhere(study, lost, trial_state.GRACE // 2)
    assert study.take(trial) is None
    elsewhere(study, lost, trial_state.GRACE + 2)
    assert study.status()[trial.name].state == "open"
    own = study.take(trial)
    assert own is not None
    with pytest.raises(UserError, match="was taken over by another process"):
        lost.report(1, 10.0)
    lost.finish([{"last_acc": 1.0}])  # too late
    own.finish([{"last_acc": 2.0}])
    assert study.status()[trial.name].results == [{"last_acc": 2.0}]


def test_a_dead_process_of_this_machine_holds_nothing(study):
    trial = study.plan.trials[0]
    child = subprocess.Popen(["true"])
    attempt = study.take(trial)
    study.storage.set_trial_user_attr(attempt.id, "pid", child.pid)
    time.sleep(0.5)  # it has ended, but nobody has waited for it
    assert study.status()[trial.name].state == "open"
    child.wait()
    assert study.status()[trial.name].state == "open"


def test_a_trial_that_keeps_killing_its_process_has_failed(study):
    trial = study.plan.trials[0]
    for epochs in (1, 0, 0, 0):  # the first got through an epoch, and does not count
        assert study.status()[trial.name].state == "open"
        attempt = study.take(trial)
        for epoch in range(epochs):
            attempt.report(epoch + 1, 10.0)
        study.storage.set_trial_state_values(attempt.id, TrialState.FAIL)
    status = study.status()[trial.name]
    assert status.state == "failed"
    assert "crashed 3 times within an epoch" in status.error
    study.reset()
    assert study.take(trial) is not None


# Whole sweeps


def fork(main, argv, out):
    """Run a command in a process of its own, which imports nothing anew."""

    def run():
        os.setpgid(0, 0)
        with out.open("w", buffering=1) as log, contextlib.redirect_stdout(log):
            os._exit(main(argv))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def ran_in_a_new_process(request):
    """Run the test in another process, once: forks of one that has trained may not train."""
    if os.environ.get("NEW_PROCESS"):
        return False
    words = ["-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEW_PROCESS", "1")
        done = run_script(Path(pytest.__file__).with_name("__main__.py"), *words)
    assert done.returncode == 0, done.stdout
    return True


def wait_for(condition, seconds=100):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_fork
def test_two_sweeps_share_a_study_and_one_resumes_what_the_other_left(
    sweep, capsys, monkeypatch, request
):
    """One is held in epoch 2 of its trials while the other does the rest; then it is killed."""
    if ran_in_a_new_process(request):
        return
    path = sweep(
        f"OVERRIDES: {{LOGGED.GATE: {sweep.folder / 'go'}}}\n"
        "VARIANTS: [{NAME: held, OVERRIDES: {LOGGED.CLOSED: True}}, {NAME: free}]\nSEEDS: 2\n"
        "TOGETHER: off\n"
    )
    held = [sweep.out / "toy" / f"held-seed={seed}" for seed in range(2)]
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda method: forked)
    other = fork(command.main, words(path, "--jobs", 2), sweep.folder / "printed")
    there = lambda: all((run / "latest").is_file() for run in held)  # noqa: E731
    wait_for(lambda: there() or not other.is_alive())
    assert command.main([*words(path), "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "Not finished: 2 running." in out
    assert "| free " in out
    once = {f"{cell}-seed={seed}": 1 for cell in ("held", "free") for seed in range(2)}
    assert started(sweep.folder) == once  # nothing twice, nothing left out
    workers = {int(line.split()[0]) for line in (sweep.folder / "log").read_text().splitlines()}
    assert len(workers) == 3
    other.kill()
    other.join()
    orphans = workers - {os.getpid()}
    wait_for(lambda: not any(trial_state.process_exists(pid) for pid in orphans))
    (sweep.folder / "go").touch()
    assert command.main([*words(path), "--jobs", "1"]) == 0
    assert "[4/4]" in capsys.readouterr().out
    assert started(sweep.folder) == {**once, **{run.name: 2 for run in held}}
    whole = rows(sweep.out / "toy" / "free-seed=0")  # the same run, uninterrupted
    assert [r["train_loss"] for r in rows(held[0])] == [r["train_loss"] for r in whole]
    for run in held:
        assert [row["epoch"] for row in rows(run)] == [1, 2]
        assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


def test_a_study_knows_its_teacher_wherever_its_file_lies(sweep, capsys):
    path = sweep("", method="KD", student="Dot", TEACHER="Dot")
    files = [sweep.folder / name for name in ("one", "moved", "other")]
    for file, value in ((files[0], 0.0), (files[2], 1.0)):
        weights = {"fc.weight": torch.full((10, 3072), value), "fc.bias": torch.ones(10)}
        torch.save({"model": weights}, file)
    shutil.copy(files[0], files[1])
    run = [*words(path), "--jobs", "1", "DISTILLER.TEACHER_CKPT"]
    assert command.main([*run, str(files[0])]) == 0
    assert command.main([*run, str(files[1])]) == 0
    capsys.readouterr()
    assert command.main([*run, str(files[2])]) == 2
    error = capsys.readouterr().err
    assert f"the teacher was not DISTILLER.TEACHER_CKPT '{files[2]}'" in error


def test_a_study_knows_how_its_teacher_is_trained(sweep, capsys):
    path = sweep("", method="KD", TEACHER="Dot", TEACHER_CFG="teacher.yaml")
    own = "_BASE_: toy.yaml\nEXPERIMENT: {NAME: teacher}\nDISTILLER: {TYPE: NONE}\n"
    (path.parent / "teacher.yaml").write_text(own)
    assert command.main([*words(path), "--jobs", "1"]) == 0
    capsys.readouterr()
    (path.parent / "teacher.yaml").write_text(own + "SOLVER: {EPOCHS: 1}\n")
    assert command.main([*words(path), "--jobs", "1"]) == 2
    assert "of the teacher: SOLVER.EPOCHS was 2, is now 1" in capsys.readouterr().err


def test_a_failing_trial_is_recorded_and_the_others_go_on(sweep, capsys):
    path = sweep("VARIANTS: [{NAME: bad, OVERRIDES: {LOGGED.FAIL: True}}, {NAME: good}]\n")
    assert command.main([*words(path), "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "- bad,seed:0 failed: RuntimeError: this method fails, on purpose" in out
    assert "Traceback" in (sweep.out / "toy" / "bad-seed=0.log").read_text()
    with (sweep.out / "table.csv").open() as handle:
        bad, good = csv.DictReader(handle)
    summary = json.loads((sweep.out / "toy" / "good-seed=0" / "summary.json").read_text())
    assert float(good["last_acc_mean"]) == summary["last_acc"]
    assert (bad["last_acc_mean"], bad["failed"], good["failed"]) == ("", "1", "0")
    assert command.main(words(path)) == 1  # what is done and what failed stays so
    assert started(sweep.folder) == {"good-seed=0": 1}
    mended = [*words(path), "--retry", "LOGGED.FAIL", "False"]
    assert command.main(mended) == 0
    assert started(sweep.folder) == {"good-seed=0": 1, "bad-seed=0": 1}
    assert command.main([*words(path), "--table", "LOGGED.FAIL", "False"]) == 0
    capsys.readouterr()
    assert command.main([*mended, "SOLVER.EPOCHS", "3"]) == 2
    assert "with other settings (SOLVER.EPOCHS was 2, is now 3)" in capsys.readouterr().err


GRID = "GRID: {SOLVER.LR: [0.01, 0.02, 0.05]}\nSEEDS: 2\n"


def test_runs_of_a_seed_train_in_lock_step_to_the_same_numbers(sweep, capsys, tmp_path):
    """One line names the runs that share; each one's log has its own output alone."""
    path = sweep(GRID)
    assert command.main([*words(path), "--jobs", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "lock-step" in line]
    rates = ("0.01", "0.02", "0.05")
    groups = [[f"LR={rate},seed:{seed}" for rate in rates] for seed in (0, 1)]
    assert lines == [f"in lock-step: {', '.join(group)}" for group in groups]
    together = {run.name: rows(run) for run in (sweep.out / "toy").glob("*/")}
    shutil.rmtree(sweep.out)
    assert command.main([*words(sweep(GRID + "TOGETHER: off\n")), "--jobs", "1"]) == 0
    assert "lock-step" not in capsys.readouterr().out
    for group in groups:
        for name in group:
            folder = name.replace(",seed:", "-seed=")
            run = sweep.out / "toy" / folder
            for row, alone in zip(together[folder], rows(run), strict=True):
                for key in ("lr", "train_loss", "train_acc", "test_loss"):
                    assert row[key] == alone[key], (name, key)


def test_a_limit_of_runs_in_lock_step(sweep, capsys):
    assert command.main([*words(sweep(GRID + "TOGETHER: 2\n")), "--jobs", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "lock-step" in line]
    assert [line.count("seed") for line in lines] == [2, 2]  # and two runs alone
    assert command.main([*words(sweep("TOGETHER: 0\n"))]) == 2
    assert "TOGETHER 0 must be auto, off, or how many runs" in capsys.readouterr().err


def test_runs_of_earlier_versions_stay_in_their_folders(sweep):
    """These had commas and colons in their names, as the study has. A failed one left its log."""
    path = sweep("GRID: {SOLVER.LR: [1, 2]}\nSEEDS: 2\n")
    old = sweep.out / "toy" / "LR=1,seed:0"
    old.mkdir(parents=True)
    (old.parent / "LR=2,seed:0.log").touch()
    plan = read_plan(path, out=sweep.out)
    folders = [trial.configs[0].EXPERIMENT.NAME for trial in plan.trials]
    assert folders == ["LR=1,seed:0", "LR=1-seed=1", "LR=2,seed:0", "LR=2-seed=1"]
    assert names(plan)[1] == "LR=1,seed:1"


def test_workers_divide_the_runs_that_could_train_together(sweep, monkeypatch):
    plan = read_plan(sweep("GRID: {SOLVER.LR: [1, 2, 3, 4, 5]}\n"), out=sweep.out)
    sweep.out.mkdir()
    study = Study(plan, f"sqlite:///{sweep.out / 'study.db'}")
    first = study.take(plan.trials[0])
    assert len(work._companions(study, first.trial, workers=2)) == 2  # three and two runs


def test_runs_with_recorded_steps_train_alone(sweep):
    path = sweep("GRID: {SOLVER.LR: [1, 2, 3], SOLVER.CUDA_GRAPHS: [false, true]}\n")
    plan = read_plan(path, out=sweep.out)
    sweep.out.mkdir()
    study = Study(plan, f"sqlite:///{sweep.out / 'study.db'}")
    usual, recorded, *_ = plan.trials
    assert work._companions(study, study.take(recorded).trial, workers=1) == []
    together = work._companions(study, study.take(usual).trial, workers=1)
    assert [each.trial.configs[0].SOLVER.CUDA_GRAPHS for each in together] == [False, False]


def test_a_trial_that_fails_while_training_leaves_no_writer_behind(sweep, capsys):
    def writers():
        return {t for t in threading.enumerate() if "EventLogger" in type(t).__name__}

    before = writers()  # of other tests
    path = sweep("OVERRIDES: {SOLVER: {LR: 1.0e+30, SCHEDULE: constant}}\n")
    assert command.main([*words(path), "--jobs", "1"]) == 1
    assert "s,seed:0 failed: non-finite loss in epoch 1" in capsys.readouterr().out
    assert writers() <= before


def test_finished_runs_are_skipped_though_the_study_is_lost(sweep, capsys):
    path = sweep("SEEDS: 2\n")
    assert command.main([*words(path), "--jobs", "1"]) == 0
    before = (sweep.out / "table.md").read_text()
    (sweep.out / "study.db").unlink()
    (sweep.out / "table.md").unlink()
    assert command.main([*words(path), "--jobs", "1"]) == 0
    assert (sweep.out / "table.md").read_text() == before
    assert set(started(sweep.folder).values()) == {1}


def fake_run(cfg, hooks):
    """A run whose accuracy in epoch e is 100 LR e + seed."""
    folder = Path(cfg.LOG.PREFIX) / "toy" / cfg.EXPERIMENT.NAME
    folder.mkdir(parents=True, exist_ok=True)
    loss = [{"epoch": epoch, "train_loss": 1.0 / epoch, "train_acc": epoch} for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, loss)))
    for epoch in (1, 2, 3):
        accuracy = 100 * cfg.SOLVER.LR * epoch + cfg.EXPERIMENT.SEED
        hooks[0].write(None, epoch, {"test_acc": accuracy})
    return {"last_acc": accuracy, "best_acc": accuracy, "selected_on": "test set"}


def test_a_search_samples_trains_every_seed_and_prunes(sweep, monkeypatch, capsys):
    monkeypatch.setattr(work, "train_or_continue", fake_run)
    path = sweep(
        "SPACE:\n  SOLVER.LR: {LOW: 0.001, HIGH: 0.1, LOG: True}\n"
        "  SOLVER.BATCH_SIZE: {LOW: 8, HIGH: 32, STEP: 8}\n  SOLVER.TYPE: [SGD, Adam]\n"
        "TRIALS: 8\nSEEDS: [1, 2]\nPRUNE: 2\n",
        epochs=3,
    )
    assert command.main([*words(path), "--jobs", "1"]) == 0
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{sweep.out / 'study.db'}")
    done = [t for t in study.trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert len(done) + len(pruned) == len(study.trials) == 8
    assert pruned
    assert all(max(t.intermediate_values) >= 2 for t in pruned)
    for trial in study.trials:
        assert 0.001 <= trial.params["SOLVER.LR"] <= 0.1
        assert trial.params["SOLVER.BATCH_SIZE"] in (8, 16, 24, 32)
        assert trial.params["SOLVER.TYPE"] in ("SGD", "Adam")
    assert len({t.params["SOLVER.LR"] for t in study.trials}) == 8
    assert all(t.value == pytest.approx(300 * t.params["SOLVER.LR"] + 1.5) for t in done)
    lines = unpadded(capsys.readouterr().out).splitlines()
    assert lines[0].startswith("WARNING: this search selects on the test set")
    best = next(line for line in lines if line.startswith("| trial "))
    best = next(line for line in lines[lines.index(best) + 2 :])
    assert best.startswith(f"| trial {study.best_trial.number}: SOLVER.LR=")


def test_a_resumed_point_of_a_search_keeps_its_values(sweep):
    path = sweep("SPACE: {SOLVER.LR: {LOW: 0.1, HIGH: 0.2}}\nTRIALS: 1\n")
    study = Study(read_plan(path, out=sweep.out), f"sqlite:///{sweep.folder / 'study.db'}")
    first = study.take(study.plan.trials[0])
    values = first.choose()
    first.end(TrialState.FAIL, end="interrupted")
    assert study.take(study.plan.trials[0]).choose() == values


@needs_fork
def test_a_teacher_is_trained_by_one_while_others_wait(sweep, request):
    if ran_in_a_new_process(request):
        return
    path = sweep("", TEACHER="Dot", TEACHER_CFG="teacher.yaml")
    text = "_BASE_: toy.yaml\nEXPERIMENT: {NAME: teacher}\nDISTILLER: {TYPE: NONE}\n"
    (path.parent / "teacher.yaml").write_text(text)
    cfg = load_config(path.parent / "toy.yaml", ["DISTILLER.TYPE", "KD"])
    folder = path.parent / "out" / "toy" / "teacher"
    printed = path.parent / "printed"
    argv = ["--cfg", str(path.parent / "toy.yaml"), "DISTILLER.TYPE", "KD"]

    def student(argv):
        wait_for(lambda: teacher.being_trained(cfg))
        return train_command.main(argv)

    def train(own, name, resume, device):
        waits = "waiting for another process to train"
        wait_for(lambda: printed.is_file() and waits in printed.read_text())
        work.train_or_continue(own)

    assert teacher.being_trained(cfg) is None
    other = fork(student, [*argv, "EXPERIMENT.NAME", "student"], printed)
    assert teacher.train_teacher(cfg, None, train) == folder / "student_latest"
    other.join(300)
    assert other.exitcode == 0
    assert "training the teacher" not in printed.read_text()
    assert len(rows(folder)) == cfg.SOLVER.EPOCHS
    assert teacher.being_trained(cfg) is None


CHAIN = (
    "SEEDS: [3]\nVARIANTS:\n  - NAME: first\n  - NAME: second\n    TEACHER: first\n"
    "    OVERRIDES: &kd {DISTILLER: {TYPE: KD}}\n"
    "  - NAME: third\n    TEACHER: second\n    OVERRIDES: *kd\n"
)


def test_a_rows_student_is_the_next_rows_teacher_seed_by_seed(sweep, capsys):
    """Each run once, whoever needs it first, and never in lock-step with its own teacher."""
    path = sweep(CHAIN, epochs=1)
    assert command.main([*words(path), "--dry-run"]) == 0
    assert "second,seed:3  DISTILLER.TYPE KD TEACHER first\n" in capsys.readouterr().out
    assert not sweep.out.exists()
    assert command.main([*words(path), "--jobs", "1"]) == 0
    assert "lock-step" not in capsys.readouterr().out
    runs = {run.name: run for run in (sweep.out / "toy").glob("*/")}
    assert len(runs) == 3
    for name, above in (("second-seed=3", "first-seed=3"), ("third-seed=3", "second-seed=3")):
        record = json.loads((runs[name] / "run.json").read_text())
        assert record["teacher"] == f"../{above}/student_latest"
        mine = torch.load(runs[name] / "latest", weights_only=True)["model"]
        theirs = torch.load(runs[above] / "student_latest", weights_only=True)["model"]
        assert torch.equal(mine["teacher.fc.weight"], theirs["fc.weight"])
    assert started(sweep.folder) == {"first-seed=3": 1}


def test_a_trial_waits_for_its_teachers_trial_in_another_process(sweep, monkeypatch):
    plan = read_plan(sweep(CHAIN), out=sweep.out)
    plan.write_teachers()
    study = Study(plan, f"sqlite:///{sweep.out / 's.db'}")
    first = work._next(study)
    ends = [lambda: first.finish([{"last_acc": 50.0}])]
    monkeypatch.setattr(work.time, "sleep", lambda seconds: ends.pop()())
    assert [first.trial.name, work._next(study).trial.name] == ["first,seed:3", "second,seed:3"]
    assert not ends


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("TEACHER: first", "TEACHER: frist", "TEACHER 'frist' must be a row above it; did you"),
        ("TEACHER: first", "TEACHER: third", r"TEACHER 'third' must be a row above it (first)"),
        ("TYPE: KD", "TYPE: NONE", "second: TEACHER has no effect on DISTILLER.TYPE NONE"),
        ("NAME: first", "NAME: first\n    OVERRIDES: {DATASET: {VAL_SPLIT: 9}}", "other DATASET"),
    ],
)
def test_a_chain_that_cannot_be_is_one_line(sweep, capsys, old, new, says):
    assert command.main([*words(sweep(CHAIN.replace(old, new, 1))), "--dry-run"]) == 2
    assert says in capsys.readouterr().err


# The table


def result(last, best, first_loss=2.0, last_loss=1.0):
    return {
        "last_acc": last,
        "best_acc": best,
        "selected_on": "test set",
        "first": {"train_loss": first_loss, "train_acc": 10.0},
        "last": {"train_loss": last_loss, "train_acc": 20.0},
    }


def test_the_table_is_mean_and_sample_deviation_over_seeds(sweep):
    text = "SEEDS: 3\nVARIANTS: [{NAME: a}, {NAME: b}, {NAME: c}]\nLOSS_FALLS: True\n"
    plan = read_plan(sweep(text), out=sweep.out)
    numbers = {
        "a,seed:0": (90, 91),
        "a,seed:1": (92, 93),
        "a,seed:2": (97, 98),
        "b,seed:0": (50, 60),
    }
    status = {
        name: Status("done", [result(*numbers[name])], {})
        if name in numbers
        else Status("open", [], {})
        for name in names(plan)
    }
    status["b,seed:1"] = Status("failed", [], {}, "non-finite loss")
    rows = table.rows(plan, status)
    text = unpadded(table.markdown(plan, rows))
    # mean 93, squared deviations 9 + 1 + 16, over n - 1 = 2
    assert (
        "| a | 93.00 ± 3.61 | 94.00 ± 3.61 | test set | 2 → 1 | 10.0 → 20.0 | yes | 3 | 0 |" in text
    )
    assert "| b | 50.00 | 60.00 | test set | 2 → 1 | 10.0 → 20.0 | yes | 1 | 1 |" in text
    assert "| c | - | - | - | - | - | - | 0 | 0 |" in text
    assert "- b,seed:1 failed: non-finite loss" in text
    assert "Not finished: 4 open." in text
    assert "over the runs of a row" in text
    first = next(csv.DictReader(table.csv_text(plan, rows).splitlines()))
    assert float(first["last_acc_std"]) == pytest.approx(13**0.5)
    assert float(first["train_loss_last"]) == 1.0
    assert not table.all_well(plan, rows)


def test_a_loss_that_did_not_fall_in_one_run_is_no_success(sweep):
    plan = read_plan(sweep("SEEDS: 2\nLOSS_FALLS: True\n"), out=sweep.out)
    runs = [result(1, 1), result(1, 1, last_loss=2.0)]
    status = {name: Status("done", [run], {}) for name, run in zip(names(plan), runs, strict=True)}
    rows = table.rows(plan, status)
    assert "| NO | 2 | 0 |" in unpadded(table.markdown(plan, rows))
    assert not table.all_well(plan, rows)
    assert table.all_well(read_plan(sweep("SEEDS: 2\n"), out=sweep.out), rows)


def test_runs_without_labels_have_no_accuracy(sweep):
    plan = read_plan(sweep("METRIC: best_knn\nLOSS_FALLS: True\n"), out=sweep.out)
    curve = {"first": {"train_loss": 2.0}, "last": {"train_loss": 1.0}}
    run = {"best_loss": 1.0, "best_knn": 80.0, "selected_on": "training images", **curve}
    rows = table.rows(plan, {names(plan)[0]: Status("done", [run], {})})
    text = unpadded(table.markdown(plan, rows))
    assert "| 80.00 | training images | 2 → 1 | - | yes | 1 | 0 |" in text
    assert next(csv.DictReader(table.csv_text(plan, rows).splitlines()))["train_acc_last"] == ""


def test_held_out_images_add_the_test_columns(sweep):
    plan = read_plan(sweep("OVERRIDES: {DATASET.VAL_SPLIT: 40}\nMETRIC: test_acc_best\n"))
    run = {**result(80, 82), "test_acc_last": 70.0, "test_acc_best": 71.0, "selected_on": "40 held"}
    rows = table.rows(plan, {names(plan)[0]: Status("done", [run], {})})
    lines = unpadded(table.markdown(plan, rows)).splitlines()
    assert lines[0].split(" | ")[1:5] == [
        *("best, on the test set", "last top-1 %", "best top-1 %", "last, on the test set")
    ]
    assert lines[2].split(" | ")[1:6] == ["71.00", "80.00", "82.00", "70.00", "40 held"]
