"""Whole sweeps: failures, resumption, lock-step, searches, teachers."""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from support import run_script, unpadded
from sweep_runs import names, needs_fork, started, words

from mdistiller.cli import sweep as command
from mdistiller.cli import train as train_command
from mdistiller.engine.cfg import load_config
from mdistiller.run import teacher
from mdistiller.sweep import trial_state, work
from mdistiller.sweep.plan import read_plan
from mdistiller.sweep.study import Study


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
