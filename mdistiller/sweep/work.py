"""Working through a sweep: worker processes that take trials from the study until none is open."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from mdistiller.config.checks import check_values
from mdistiller.engine.cfg import Config
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.registry import UserError
from mdistiller.run.sharing import data_key
from mdistiller.run.teacher import being_trained
from mdistiller.run.train import in_lock_step, train_or_continue
from mdistiller.run_folder.folder import read_lines
from mdistiller.run_folder.naming import experiment_name
from mdistiller.run_folder.record import one_line
from mdistiller.runtime import keep_freed_memory, resolve_device
from mdistiller.sweep.plan import Plan, Trial
from mdistiller.sweep.study import Attempt, Study
from mdistiller.sweep.trial_state import HEARTBEAT
from mdistiller.user_code.forks import active
from mdistiller.user_code.imports import import_user_modules

MOST = 16  # runs that train in lock-step unless TOGETHER says more
_POLL = 2.0  # seconds between two looks at trials that others run
CURVE = ("train_loss", "train_acc")  # of an epoch, kept for the table


def run_sweep(study: Study, jobs: int | None = None) -> None:
    """Work until no trial is open: in `jobs` processes, by default one a GPU or a CPU core."""
    jobs = jobs or default_jobs(study.plan)
    while waiting := study.open_trials():
        count = min(jobs, len(waiting))
        before = study.storage.get_n_trials(study.id)
        if count == 1:
            work(study)
        elif not _run_processes(study, count) and study.storage.get_n_trials(study.id) == before:
            raise UserError("every worker process died before it began a trial; see above")


def default_jobs(plan: Plan) -> int:
    """One worker a GPU; without any, one a core this process may use."""
    name = plan.trials[0].configs[0].DEVICE
    device = resolve_device(name)
    if device.type == "cuda":
        return len(_gpus()) if name in ("auto", "cuda") else 1
    if device.type == "mps":
        return 1
    cores = getattr(os, "sched_getaffinity", None)
    return len(cores(0)) if cores else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def _run_processes(study: Study, count: int) -> bool:
    """Work in processes of their own, each on its GPU if there are several; False if all died."""
    gpus = _gpus() if torch.cuda.is_available() else []
    several = len(gpus) > 1 and study.plan.trials[0].configs[0].DEVICE in ("auto", "cuda")
    context = multiprocessing.get_context("spawn")
    names = [gpus[index % len(gpus)] if several else "" for index in range(count)]
    workers = [
        context.Process(target=_worker, args=(study.plan, study.url, name, count)) for name in names
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # a terminal's Ctrl-C has reached the workers as well
        for worker in workers:
            worker.join(5)
            worker.terminate()
        raise
    dead = [worker.exitcode for worker in workers if worker.exitcode]
    for code in dead:
        print(f"a worker process died (exit code {code})", flush=True)
    return len(dead) < count


def _worker(plan: Plan, url: str, gpu: str, workers: int) -> None:
    """One of `workers` processes; it uses `gpu` alone, as CUDA_VISIBLE_DEVICES names it."""
    keep_freed_memory()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    for trial in plan.trials:
        import_user_modules(trial.configs[0].IMPORTS)
    with contextlib.suppress(KeyboardInterrupt):
        work(Study(plan, url), workers)


def work(study: Study, workers: int = 1) -> None:
    """Take and run open trials until all are taken, as one of `workers` processes."""
    if resolve_device(study.plan.trials[0].configs[0].DEVICE).type == "cpu":
        torch.set_num_threads(1)  # best for small networks, and sums do not depend on --jobs
    while attempt := _next(study):
        attempts = [attempt, *_companions(study, attempt.trial, workers)]
        if len(attempts) == 1:
            _run_trial(study, attempt)
            continue
        print(f"in lock-step: {', '.join(each.trial.name for each in attempts)}", flush=True)
        jobs = [functools.partial(_run_trial, study, each) for each in attempts]
        for outcome in in_lock_step(jobs, attempt.trial.configs[0]):
            outcome.reraise()


def _companions(study: Study, trial: Trial, workers: int) -> list[Attempt]:
    """Attempts at open trials that can share batches and teacher with `trial`.

    If there are more workers than kinds of data, each takes its part of them.
    """
    limit = study.plan.together
    if limit == "off" or study.plan.space or trial.configs[0].SOLVER.CUDA_GRAPHS:
        return []
    open_trials = study.open_trials()
    kind = _kind(trial)
    kinds = {kind, *map(_kind, open_trials)}
    same = [other for other in open_trials if _kind(other) == kind]
    same = [other for other in same if not other.configs[0].SOLVER.CUDA_GRAPHS]
    share = -(-(len(same) + 1) // max(1, workers // len(kinds)))
    limit = min(share, MOST if limit == "auto" else int(limit)) - 1
    free = (
        other for other in same if not _waits(study, other) and not being_trained(other.configs[0])
    )
    attempts = (study.take(other) for other in free)
    return list(itertools.islice(filter(None, attempts), limit))


def _kind(trial: Trial) -> str:
    """Trials of one kind can train in lock-step."""
    cfg = trial.configs[0]
    with active(cfg.IMPORTS):
        return data_key(cfg)


def _waits(study: Study, trial: Trial) -> bool:
    """Whether the teacher of a trial is that of a trial (TEACHER) that is still to end."""
    teacher = study.plan.teachers.get(trial.configs[0].DISTILLER.TEACHER_CFG)
    return teacher is not None and study.status()[teacher.name].state in ("open", "running")


def _next(study: Study) -> Attempt | None:
    """An attempt at an open trial, if there is one; trials whose teacher is being trained last.

    If all others wait for trials of other processes to end, this does as well.
    """
    while True:
        later, blocked = [], False
        for trial in study.open_trials():
            teacher = being_trained(trial.configs[0])
            if _waits(study, trial):
                blocked = True
            elif teacher:
                later.append((trial, teacher))
            elif attempt := study.take(trial):
                return attempt
        for trial, teacher in later:
            if attempt := study.take(trial):
                print(f"{trial.name}: waits until the teacher in {teacher} is trained", flush=True)
                return attempt
        if not blocked:
            return None
        time.sleep(_POLL)


def _run_trial(study: Study, attempt: Attempt) -> None:
    """Run an attempt, record how it ended and print a line."""
    plan, trial = study.plan, attempt.trial
    started = time.perf_counter()
    with _heartbeats(attempt):
        try:
            params = attempt.choose() if plan.space else {}
            results = []
            for number, cfg in enumerate(trial.configs):
                hook = _Report(attempt, first=number * cfg.SOLVER.EPOCHS)
                results.append(_run(_with(cfg, params), hook))
            outcome = f"{plan.metric} {attempt.finish(results):.2f}"
        except optuna.TrialPruned:
            attempt.end(TrialState.PRUNED)
            outcome = "pruned"
        except KeyboardInterrupt:
            attempt.end(TrialState.FAIL, end="interrupted")
            raise
        except Exception as error:  # the other trials go on
            outcome = one_line(error)
            attempt.end(TrialState.FAIL, error=outcome)
            outcome = f"failed: {outcome}"
    if torch.cuda.is_available():  # what a failed run leaves in cycles
        gc.collect()
        torch.cuda.empty_cache()
    states = [status.state for status in study.status().values()]
    ended = len(states) - states.count("open") - states.count("running")
    seconds = time.perf_counter() - started
    print(f"[{ended}/{len(states)}] {trial.name}: {outcome} ({seconds:.0f} s)", flush=True)


def _with(cfg: Config, params: Mapping[str, Any]) -> Config:
    """A config with the values of a searched point."""
    point: Config = cfg.clone()
    point.defrost()
    point.merge_from_list([word for pair in params.items() for word in pair])
    check_values(point)
    point.freeze()
    return point


def _run(cfg: Config, hook: Hook) -> dict[str, Any]:
    """Summary of a run, with the numbers of its first and last epoch; its output goes to a log."""
    folder = Path(cfg.LOG.PREFIX) / experiment_name(cfg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            summary = train_or_continue(cfg, hooks=[hook])
        except Exception:
            traceback.print_exc()
            raise
    rows = read_lines(folder / "metrics.jsonl")
    curve = [{key: row[key] for key in CURVE if key in row} for row in rows if "epoch" in row]
    return {**summary, "first": curve[0], "last": curve[-1]}


class _Report(Hook):
    """Reports each epoch's value of the study's metric; ends a run that is pruned or taken over.

    Args:
        first: epochs of the runs before this one.
    """

    def __init__(self, attempt: Attempt, first: int):
        self.attempt, self.first = attempt, first
        metric = attempt.study.plan.metric  # last_NAME, best_NAME or test_acc_WHICH
        self.key = f"test_{metric.split('_', 1)[1]}" if metric[:5] != "test_" else "test_acc"

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        value = record.get(self.key)
        if value is not None and self.attempt.report(self.first + epoch, value):
            raise optuna.TrialPruned


@contextlib.contextmanager
def _heartbeats(attempt: Attempt) -> Iterator[None]:
    """Record heartbeats; end this process if its parent is gone."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(attempt, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(attempt: Attempt, stop: threading.Event) -> None:
    parent = multiprocessing.parent_process()
    due = time.monotonic() + HEARTBEAT
    while not stop.wait(1.0):
        if parent is not None and not parent.is_alive():
            attempt.end(TrialState.FAIL, end="interrupted")
            os._exit(1)
        if time.monotonic() >= due:
            due += HEARTBEAT
            with contextlib.suppress(Exception):  # the study may be out of reach for a while
                attempt.beat()
