"""What a run prints: the lines at its start, and one line an epoch."""

import io
import json
import re
import sys
import types

import pytest
from support import image_folder, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks import console
from mdistiller.engine.callbacks.console import EpochTable
from mdistiller.engine.callbacks.ema import AverageStudent
from mdistiller.engine.callbacks.peers import EvaluatePeers
from mdistiller.engine.callbacks.teacher_cache import TeacherCache
from mdistiller.run.together import PrefixedStream

TERMS = {"ce": 1.5, "kd": 11.25, "feat": 0.1, "classifier": 1.0, "a": 1e6, "b": 2.0, "c": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(monkeypatch, records, stream=None, epochs=100, stage="", hooks=()):
    """What a table prints for records, one an epoch that takes a second; 3 of 5 are the best."""
    stream = stream or io.StringIO()
    clock = iter(range(1000))
    table = EpochTable()
    trainer = types.SimpleNamespace(
        **{"stage": stage, "epochs": epochs, "epoch": 0, "step": 0, "position": None},
        train_loader=range(4),
        hooks=hooks,
        epochs_left=lambda epoch: epochs - epoch,
    )
    with monkeypatch.context() as patch:
        patch.setattr(console.time, "monotonic", lambda: next(clock))
        patch.setattr(sys, "stdout", stream)
        table.begin(trainer)
        for epoch, record in enumerate(records, 1):
            score = "12.50*" if epoch % 5 < 3 else "12.50 "
            trainer.columns = lambda record, score=score: {"train %": "99.50", "eval %": score}
            table.show(trainer, epoch, {"lr": 0.1, "images_per_second": 123.4, **record})
    return getattr(stream, "stream", stream).getvalue().splitlines()


def record(*names):
    terms = {f"train_loss_{name}": TERMS[name] for name in names}
    return {"train_loss": sum(terms.values()), **terms}


@pytest.mark.parametrize("names", [("ce",), ("ce", "kd"), tuple(TERMS)])
def test_the_lines_of_epochs_are_aligned_within_100_columns(monkeypatch, names):
    header, *lines = printed(monkeypatch, [record(*names)] * 12)
    assert {len(line) for line in (header, *lines)} == {len(header)}
    assert len(header) <= 100
    titles = header.split()
    assert titles[:3] == ["epoch", "lr", "loss"]
    shown = [name for name in names[:5] if len(names) > 1]
    assert titles[3 : 3 + len(shown)] == [name[:6] for name in shown]
    ends = [match.end() for match in re.finditer(r"\S+( %)?", header)]
    for line in lines:
        assert all(line[end - 1] != " " or header[end - 1] == "%" for end in ends), line
    assert lines[-1].split()[-1] == "0:01:28"  # 88 epochs of a second


def test_a_header_stands_where_columns_change_and_every_40_lines(monkeypatch):
    lines = printed(monkeypatch, [record("ce")] * 45 + [record("ce", "kd")] * 2)
    headers = [number for number, line in enumerate(lines) if "epoch" in line]
    assert headers == [0, 41, 47]
    assert "stage" in printed(monkeypatch, [record("ce")], stage="FSP")[0]


def test_hooks_add_columns_behind_those_of_the_trainer(monkeypatch):
    monkeypatch.setattr(EvaluatePeers, "_peers", lambda self, trainer: [("peer1", None)])
    scores = {"ema_test_acc": 50.0, "peer1_test_acc": 25.0, "teacher_hits": 75.0}
    hooks = AverageStudent(), EvaluatePeers(), TeacherCache.__new__(TeacherCache)
    header, line = printed(monkeypatch, [{**record("ce"), **scores}], hooks=hooks)
    assert re.search(r"eval %  +ema %  +peer1 %  +cached %  +img/s", header)
    assert line.split()[4:8] == ["12.50*", "50.00", "25.00", "75"]


def test_the_best_epoch_is_coloured_on_a_terminal_alone(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, best, _, other, *_ = printed(monkeypatch, [record("ce")] * 4, Terminal())
    assert "\033[32m12.50*\033[0m" in best
    assert "\033" not in other
    assert not any("\033" in line for line in printed(monkeypatch, [record("ce")] * 4))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.coloured("text", "EVAL") == "text"


def test_a_narrower_terminal_gets_fewer_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    lines = printed(monkeypatch, [record(*TERMS)] * 2, Terminal())
    assert max(map(len, lines[1:])) <= 72 + len("\033[32m" + "\033[0m")
    assert lines[1].split()[-1] == "0:01:39"


def test_runs_in_lock_step_name_the_numbers_in_each_line(monkeypatch):
    (line,) = printed(monkeypatch, [record("ce", "kd")], PrefixedStream(io.StringIO(), "digits/kd"))
    assert line.startswith("digits/kd: epoch 1/100  lr 0.1  loss 12.7500  ce 1.5000  kd 11.2500")


def test_a_run_begins_with_its_data_networks_and_folder(tmp_path, capsys):
    """Not with its config, which is in the folder."""
    root = image_folder(tmp_path / "data", ("cat", "dog"))  # 8 images of a class, and 4 in val/
    (root / "train" / "cat" / "notes.txt").write_text("")
    (root / "train" / "dog" / "broken.png").write_bytes(b"\x89PNG")
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "DATASET.VAL_SPLIT", "4"]
    words += ["DATASET.SKIP_CORRUPT", "True", "EXPERIMENT.NAME", "run"]
    teacher = str(saved_teacher(tmp_path, num_classes=2))
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CKPT": teacher, "epochs": 1}
    config = str(write_config(tmp_path, "SOLVER: {ACCUMULATE: 2, BATCH_SIZE: 4}\n", **settings))
    assert train_command.main(["--cfg", config, "--print-config", *words]) == 0
    assert "VAL_SPLIT: 4\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert train_command.main(["--cfg", config, *words]) == 0
    out = capsys.readouterr().out
    start, folder = re.split(r"\n +epoch ", out)[0], tmp_path / "out" / "toy" / "run"
    assert "TEMPERATURE: 4" not in start
    rows, title = {}, ""
    for line in start.splitlines():
        title = line[:10].strip() or title
        rows[title] = f"{rows.get(title, '')} {line[10:]}".strip()
    titles = "data, teacher, student, method, device, steps, folder, curves"
    assert ", ".join(rows) == titles
    assert rows["data"] == (
        "imagefolder: 12 images of 32 x 32, 2 classes (fewest: 6 of cat), 8 test images; left out: "
        "4 held out to select the best epoch, 1 without an image suffix, 1 unreadable"
    )
    summary = json.loads((folder / "summary.json").read_text())
    accuracy, count = summary["teacher_acc"], summary["parameters"] / 1e6
    size = f"resnet8, {count:.2f} M parameters"
    assert rows["teacher"] == f"{size}, accuracy {accuracy:.2f} %, from {teacher}"
    assert rows["student"] == size
    assert rows["method"].startswith("KD: TEMPERATURE 4.0, ")
    assert re.match(r"cpu \(.*\), fp32, \d+ thread", rows["device"])
    assert rows["steps"] == "1 epoch x 2 steps of 8 images; SGD, lr 0.05, multistep"
    assert rows["folder"] == str(folder)
    assert rows["curves"].endswith(f"tensorboard --logdir {folder}")
