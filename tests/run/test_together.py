"""Runs that train in lock-step compute what each computes alone, to the bit."""

import argparse
import json
import time

import pytest
import torch
from support import command, same_state, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks.preemption import Preempted
from mdistiller.engine.cfg import load_config
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import UserError
from mdistiller.run.sharing import SharedTeacher, _mark
from mdistiller.run.together import Outcome
from mdistiller.run.train import train, train_together

# name -> method, and what its config has beside
RUNS = {
    "plain": ("NONE", {}),
    "kd": ("KD", {}),
    "cached": ("KD", {"TEACHER_CACHE": "memory"}),
    "maps": ("AT", {}),
    "bank": ("CRD", {}),
    "staged": ("FSP", {}),
    "pairs": ("MLKD", {}),
    "merged": ("REVIEWKD", {}),  # its last batch takes in the image that would be alone
}
COMMON = ["DATASET.VAL_SPLIT", 31]  # of 160: four batches of 32 images and one of one
OVERRIDES = {"staged": ["FSP.INIT.EPOCHS", 1], "maps": ["SOLVER.EMA", 0.9, "SOLVER.ACCUMULATE", 2]}


def configs(folder, names=tuple(RUNS), overrides=(), **more):
    made = []
    for name in names:
        method, settings = RUNS[name]
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        if method != "NONE":
            weights = saved_teacher(folder.parent, "resnet8")
            settings = {"TEACHER": "resnet8", "TEACHER_CKPT": str(weights), **settings}
        text = f"EXPERIMENT: {{NAME: {name}}}\n"
        path = write_config(place, text, method=method, **{"epochs": 2, **settings, **more})
        made.append(load_config(path, [*COMMON, *OVERRIDES.get(name, []), *overrides]))
    return made


def left_by(folder, name):
    """Weights, optimizer and records of a run, without times."""
    (path,) = folder.glob(f"{name}/out/toy/{name}/latest")
    state = torch.load(path, weights_only=True)
    clock = ("seconds", "images_per_second", "teacher_hits", "time")
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    records = [{key: row[key] for key in row if key not in clock} for row in rows]
    return state["model"], state["optimizer"]["state"], records


def same_runs(first, second, names):
    for name in names:
        (model, momenta, rows), (other, others, other_rows) = (
            left_by(folder, name) for folder in (first, second)
        )
        assert rows == other_rows, name
        assert same_state(model, other), name
        for key in momenta:
            assert same_state(momenta[key], others[key]), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    for cfg in configs(folder):
        train(cfg)
    return folder


def test_every_run_is_as_alone_and_the_teacher_runs_once(alone, monkeypatch):
    steps, forwards = [], []
    whole, call = BaseTrainer.train_iter, SharedTeacher.__call__

    def train_iter(self, data, epoch, meters):
        if not self.stage:
            steps.append((epoch, self.step))
        return whole(self, data, epoch, meters)

    def count(self, image):
        if hasattr(image, "batch_of_group") and self.plain is False:
            at, _ = image.batch_of_group
            forwards.extend([] if at in self._outputs else [at])
        return call(self, image)

    monkeypatch.setattr(BaseTrainer, "train_iter", train_iter)
    monkeypatch.setattr(SharedTeacher, "__call__", count)
    together = alone.parent / "together"
    began = time.perf_counter()
    outcomes = train_together(configs(together))
    (together / "seconds").write_text(str(time.perf_counter() - began))
    assert [outcome.error for outcome in outcomes] == [None] * len(RUNS)
    same_runs(alone, together, RUNS)
    assert steps == sorted(steps)  # no run is a step ahead
    main = [at for at in forwards if at[0] < 10**6]
    batches = [(0, 32), (1, 32), (2, 32), (3, 32), (4, 1)]
    expected = [(e, *batch, view) for e in (1, 2) for batch in batches for view in (0, 1)]
    expected += [(e, 3, 33, 0) for e in (1, 2)]
    assert set(main) == set(expected)  # the weak view's is for all
    # one batch is made again: FSP's initialisation stage comes after the others' first step
    assert len(main) <= len(expected) + 1


def test_images_that_a_method_has_changed_go_through_the_teacher():
    taken = []
    teacher = SharedTeacher(lambda image: taken.append(image) or image.sum(), plain=True)
    image = torch.ones(2, 3, 4, 4)
    _mark(image, (1, 0, 2))
    assert teacher(image) == teacher(image) == 96
    assert len(taken) == 1
    image[0] += 1
    assert teacher(image) == 144


def test_mixed_precision_changes_nothing(tmp_path):
    """Autocast keeps its casts of weights per process: a run must not get those of another."""
    names, folders = ["kd", "maps"], (tmp_path / "alone", tmp_path / "together")
    words = ["SOLVER.AMP", "bf16", "SOLVER.CHANNELS_LAST", True]
    first, second = (configs(folder, names, [*words, "SOLVER.EPOCHS", 1]) for folder in folders)
    for cfg in first:
        train(cfg)
    assert [outcome.error for outcome in train_together(second)] == [None] * len(names)
    same_runs(*folders, names)


def test_a_run_that_fails_leaves_the_others_untouched(alone, monkeypatch):
    folder = alone.parent / "failing"
    whole = BaseTrainer.train_iter

    def train_iter(self, data, epoch, meters):
        if self.log_path.name == "kd" and (epoch, self.step) == (1, 3):
            raise RuntimeError("broken")
        return whole(self, data, epoch, meters)

    monkeypatch.setattr(BaseTrainer, "train_iter", train_iter)
    names = ["plain", "kd", "maps"]
    failed = train_together(configs(folder, names))[1].error
    assert isinstance(failed, RuntimeError)
    same_runs(alone, folder, ["plain", "maps"])


def test_runs_stopped_in_the_middle_all_resume(alone, monkeypatch):
    """One is a step further than the other when both stop; one has ended its first epoch."""
    folder = alone.parent / "stopped"
    names = ["cached", "bank"]
    whole = BaseTrainer.train_iter

    def train_iter(self, data, epoch, meters):
        if (epoch, self.step) == (2, 2 + (self.log_path.name == "bank")):
            raise KeyboardInterrupt
        self.position = None
        message = whole(self, data, epoch, meters)
        if self.log_path.name == "bank" and (epoch, self.step) == (2, 2):
            from mdistiller.engine.checkpoints.resume import current_position

            self.position = current_position(self)
            self.save()
            self.position = None
        return message

    with monkeypatch.context() as patch:
        patch.setattr(BaseTrainer, "train_iter", train_iter)
        outcomes = train_together(configs(folder, names))
    assert all(isinstance(outcome.error, KeyboardInterrupt) for outcome in outcomes)
    outcomes = train_together(configs(folder, names), resume=True)
    assert [outcome.error for outcome in outcomes] == [None, None]
    same_runs(alone, folder, names)


def test_each_run_counts_its_own_time(alone):
    """Together they did not train longer than the clock says; waiting would count six times."""
    seconds = {}
    for name in RUNS:
        (path,) = (alone.parent / "together").glob(f"{name}/out/toy/{name}/summary.json")
        seconds[name] = json.loads(path.read_text())["seconds"]
    took = float((alone.parent / "together" / "seconds").read_text())
    assert sum(seconds.values()) < 1.5 * took


def test_the_command_takes_several_configs(tmp_path, capsys):
    """A run that fails is named, and gives the exit code."""
    words = []
    for name, text in (("good", ""), ("bad", "SOLVER: {LR: 1.0e+30}\n")):
        (tmp_path / name).mkdir()
        file = write_config(tmp_path / name, f"EXPERIMENT: {{NAME: {name}}}\n{text}", epochs=1)
        words += ["--cfg", str(file)]
    assert train_command.main([*words, "SOLVER.MOMENTUM", "0.8"]) == 2
    printed = capsys.readouterr()
    assert "toy/good: epoch 1/1  lr 0.05  loss " in printed.out  # without what all share
    assert "toy/bad-MOMENTUM=0.8 failed:\nerror: non-finite" in printed.err
    assert (tmp_path / "good" / "out" / "toy" / "good-MOMENTUM=0.8" / "summary.json").is_file()


def test_every_failure_is_told_and_the_first_one_gives_the_exit_code(tmp_path, monkeypatch, capsys):
    outcomes = [Outcome() for _ in range(3)]
    errors = (UserError("the first"), RuntimeError("the second"), Preempted("the third"))
    for outcome, error in zip(outcomes, errors, strict=True):
        outcome.error = error
    monkeypatch.setattr("mdistiller.run.train.train_together", lambda *_, **__: outcomes)
    args = argparse.Namespace(opts=[], resume=None, allow_changes=False)
    assert train_command.train_all(configs(tmp_path, ["plain", "kd", "maps"]), args) == 2
    printed = capsys.readouterr().err
    assert all(f"{error}\n" in printed for error in errors)


UNINDEXED = """
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank_zero_first, rank

@trainer_dict.register("unindexed")
class Unindexed(BaseTrainer):
    def __init__(self, *args):
        with local_rank_zero_first():
            if rank() == 0:
                raise UserError("the index cannot be written")
"""


def test_two_processes_train_together_what_they_train_alone(tmp_path):
    """Gloo processes: all take the turns in the same order, also when a run has failed in both, or
    in the first where that one works for all."""
    names = ["kd", "plain"]
    words = {}
    for folder in (tmp_path / "alone", tmp_path / "together"):
        configs(folder, names, epochs=1)
        words[folder.name] = [["--cfg", folder / name / "toy.yaml"] for name in names]
    (tmp_path / "unindexed.py").write_text(UNINDEXED)
    group = [*words["together"][0], "--import", tmp_path / "unindexed.py"]
    for name, text in (("bad", "LR: 1.0e+30"), ("none", "TRAINER: unindexed")):
        (tmp_path / name).mkdir()
        text = f"EXPERIMENT: {{NAME: {name}}}\nSOLVER: {{{text}}}\n"
        group += ["--cfg", write_config(tmp_path / name, text)]
    group += words["together"][1]
    for given, code in ((words["alone"][0], 0), (words["alone"][1], 0), (group, 2)):
        done = command(*given, processes=2)
        assert done.returncode == code, done.stderr
    assert done.stderr.count("error: non-finite") == 1
    assert done.stderr.count("error: the index cannot be written") == 1
    same_runs(tmp_path / "alone", tmp_path / "together", names)


def test_a_run_that_fails_in_one_process_alone_ends_all(alone, monkeypatch):
    """The other process waits within this run: the sums of the next one would mix with its own."""
    folder = alone.parent / "one_process"
    monkeypatch.setattr("mdistiller.run.together.fails_everywhere", lambda run: False)
    first, second = configs(folder, ["plain", "kd"])
    first.defrost()
    first.SOLVER.LR = 1e30
    with pytest.raises(UserError, match="non-finite"):
        train_together([first, second])
    assert not (folder / "kd" / "out" / "toy" / "kd" / "summary.json").exists()


def test_options_of_forks_are_refused_for_several_configs(tmp_path, capsys):
    """They change the node of one config's method."""
    words = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        words += ["--cfg", str(write_config(tmp_path / name))]
    assert train_command.main([*words, "--logit-stand"]) == 2
    assert "the options of forks' commands go with one --cfg" in capsys.readouterr().err


def test_runs_with_other_data_are_refused(tmp_path):
    first, second = configs(tmp_path, ["plain", "kd"])
    second.defrost()
    second.SOLVER.BATCH_SIZE = 16
    with pytest.raises(UserError, match=r"cannot train together: .*SOLVER\.BATCH_SIZE"):
        train_together([first, second])
    with pytest.raises(UserError, match="two configs have the run folder toy/plain"):
        train_together([first, first])
