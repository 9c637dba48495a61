"""The files of a run folder: hashes, what is kept, other formats, locks, room on the disk."""

import json
import os
import shutil
import threading

import pytest
import torch
from filelock import FileLock, Timeout
from support import same_state, write_config
from test_training import load

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks.default import Evaluate
from mdistiller.engine.checkpoints.store import Store
from mdistiller.engine.checkpoints.write import load_checkpoint
from mdistiller.files.hashes import file_hash
from mdistiller.registry import UserError
from mdistiller.run_folder import lock


def train(folder, text="", code=0, **settings):
    path = write_config(folder, text, student="BabyStudent", **settings)
    assert train_command.main(["--cfg", str(path)]) == code
    return folder / "out" / "toy" / "run"


def test_files_are_listed_by_hash_pruned_and_copied_as_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    text = "LOG: {SAVE_CHECKPOINT_FREQ: 1, KEEP_CHECKPOINTS: 2, SAFETENSORS: True}\n"
    run = train(tmp_path, text, epochs=4)
    names = {path.name for path in run.iterdir()}
    assert {name for name in names if name.startswith("epoch")} == {"epoch_3", "epoch_4"}
    assert {name for name in names if name[-1].isdigit() and name.startswith("student")} == {
        "student_3",
        "student_4",
    }
    assert "student_3.safetensors" in names
    assert "student_2.safetensors" not in names
    files = json.loads((run / "checkpoints.json").read_text())["files"]
    for name in ("latest", "previous", "best", "student_best", "student_best.safetensors"):
        assert files[name][0]["sha256"] == file_hash(run / name)
    assert load(run / "previous")["epoch"] == 3
    whole, copy = (load_checkpoint(run / f"student_best{end}") for end in ("", ".safetensors"))
    assert same_state(whole["model"], copy["model"])
    assert copy["norm"] == whole["norm"]


def state(epoch):
    return {"epoch": epoch, "model": {}, "optimizer": {}, "tensor": torch.arange(100) + epoch}


def test_a_listed_file_is_good_whenever_the_process_dies(tmp_path, monkeypatch):
    """Between the manifest and the move, between the moves, and after them."""
    store = Store(tmp_path)
    store.save(state(1), "latest")
    store.save(state(2), "latest")
    for moment in ("link", "replace"):
        copy = tmp_path / moment
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("link", "replace"))
        original = getattr(os, moment)

        def dies(*args, original=original):
            if str(args[-1]).endswith(("/latest", "previous.new")):
                raise KeyboardInterrupt
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, moment, dies)
            with pytest.raises(KeyboardInterrupt):
                Store(copy).save(state(3), "latest")
        assert Store(copy).newest()[1]["epoch"] == 2
        Store(copy).save(state(4), "latest")
        assert [Store(copy).load(name)["epoch"] for name in ("latest", "previous")] == [4, 2]


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
def test_moves_that_fail_again_and_again_leave_the_file_known(tmp_path, error):
    store = Store(tmp_path)
    for epoch in (1, 2):
        store.save(state(epoch), "latest")
    original = os.replace

    def fails(source, target):
        if str(target).endswith("/latest"):
            raise error(13, "Permission denied")
        original(source, target)

    for epoch in range(3, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", fails)
            with pytest.raises((UserError, KeyboardInterrupt)):
                store.save(state(epoch), "latest")
        assert [store.load(name)["epoch"] for name in ("latest", "previous")] == [2, 1]
    for path in tmp_path.iterdir():  # as in a copy of the folder
        os.utime(path, (1, 1))
    store.save(state(8), "latest")
    assert [store.load(name)["epoch"] for name in ("latest", "previous")] == [8, 2]


def test_going_back_follows_the_manifest_not_the_times_of_files(tmp_path):
    store = Store(tmp_path)
    for age, (name, epoch) in enumerate({"epoch_80": 80, "epoch_40": 40, "best": 60}.items()):
        store.save(state(epoch), name, epoch=epoch)
        os.utime(tmp_path / name, (age, age))
    assert store.candidates() == ["latest", "epoch_80", "best", "epoch_40"]
    (tmp_path / "checkpoints.json").unlink()
    assert store.candidates() == ["latest", "best", "epoch_40", "epoch_80"]


def test_pruning_keeps_what_this_epoch_wrote_and_forgets_what_is_gone(tmp_path):
    store = Store(tmp_path)
    for epoch in (40, 80, 10, 20):  # it went back to before epoch 10
        store.save(state(epoch), f"epoch_{epoch}", epoch=epoch)
    store.prune(1, 20)
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == [
        "epoch_20",
        "epoch_40",
        "epoch_80",
    ]
    store.prune(2, 80)
    store.save(state(80), "best")
    assert set(store.manifest()) == {"best", "epoch_40", "epoch_80"}


def test_a_student_that_is_not_what_was_written_is_not_read(tmp_path, capsys):
    Store(tmp_path).save_network(torch.nn.Linear(30, 30), "student_best")
    whole = (tmp_path / "student_best").read_bytes()
    contents = bytearray(whole)
    contents[len(contents) // 2] ^= 64
    (tmp_path / "student_best").write_bytes(contents)
    with pytest.raises(UserError, match="student_best is not what its run wrote"):
        load_checkpoint(tmp_path / "student_best")
    (tmp_path / "checkpoints.json").write_text('{"files": ')
    (tmp_path / "student_best").write_bytes(whole)
    load_checkpoint(tmp_path / "student_best")
    assert "checkpoints.json is damaged: files beside it are not checked" in capsys.readouterr().err


def test_only_students_left_are_not_trained_over(tmp_path, capsys):
    run = train(tmp_path, epochs=1)
    for name in ("latest", "previous", "best", "summary.json"):
        (run / name).unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    train(tmp_path, code=2, epochs=1)
    assert (
        "holds what a run has trained (student_best) but no checkpoint" in capsys.readouterr().err
    )
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for path in run.glob("student_*"):  # what a run leaves that dies before its first checkpoint
        path.unlink()
    train(tmp_path, epochs=1)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_best_that_was_not_written_is_when_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """It dies when `latest` is there and `best` is not; the moving average's file as well."""
    original = Store.save

    def dies(self, contents, name, **facts):
        if name == "best" and facts["epoch"] == 2:
            raise KeyboardInterrupt
        original(self, contents, name, **facts)

    monkeypatch.setattr(Evaluate, "after_epoch", lambda *args: args[-1].update(numbers[args[2]]))
    numbers = {epoch: {"test_acc": 50.0 + epoch, "test_loss": 1.0} for epoch in (1, 2, 3)}
    numbers[3]["test_acc"] = 1.0
    text = "SOLVER: {EMA: 0.5}\n"
    monkeypatch.setattr(Store, "save", dies)
    run = train(tmp_path, text, code=130, epochs=3)
    monkeypatch.setattr(Store, "save", original)
    assert [load(run / name)["epoch"] for name in ("latest", "best")] == [2, 1]
    path = write_config(tmp_path, text, student="BabyStudent", epochs=3)
    assert train_command.main(["--cfg", str(path), "--resume"]) == 0
    assert json.loads((run / "summary.json").read_text())["best_epoch"] == 2
    assert [load(run / name)["epoch"] for name in ("latest", "best")] == [3, 2]
    kept = load(run / "best")
    students = {name: load(run / f"student_{name}")["model"] for name in ("best", "ema_latest")}
    own = {k.removeprefix("student."): v for k, v in kept["model"].items() if "student." in k}
    assert same_state(own, students["best"])
    assert same_state(load(run / "latest")["ema"]["model"], students["ema_latest"])


def test_what_cannot_be_read_back_replaces_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(state(1), "latest")
    monkeypatch.setattr("mdistiller.engine.checkpoints.store.file_hash", lambda path: "other")
    with pytest.raises(UserError, match="what is read back differs from what was written"):
        store.save(state(2), "latest")
    monkeypatch.undo()
    assert store.newest()[1]["epoch"] == 1


def test_a_damaged_latest_does_not_take_the_good_ones_place(tmp_path):
    store = Store(tmp_path)
    for epoch in (1, 2):
        store.save(state(epoch), "latest")
    os.truncate(tmp_path / "latest", 50)
    assert store.newest()[0] == "previous"
    store.put_aside("previous")
    store.save(state(2), "latest")
    assert [store.load(name)["epoch"] for name in ("latest", "previous")] == [2, 1]


def test_two_runs_never_write_one_folder(tmp_path, capsys):
    run = tmp_path / "out" / "toy" / "run"
    run.mkdir(parents=True)
    with FileLock(run / ".lock"):
        train(tmp_path, code=2, epochs=1)
    assert "is being written by another process: wait for it, or" in capsys.readouterr().err
    train(tmp_path, epochs=1)


def test_a_process_enters_its_own_lock_again(tmp_path):
    """A teacher's folder is locked by who needs it, and by its run; in lock-step, by threads."""
    with lock.locked(tmp_path):
        with lock.locked(tmp_path):
            pass

        def enter():
            with lock.locked(tmp_path):
                pass

        entered = threading.Thread(target=enter, daemon=True)
        entered.start()
        entered.join(10)
        assert not entered.is_alive()
        with pytest.raises(Timeout):  # still locked for others
            FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert not lock.is_locked(tmp_path)


def test_low_disk_is_told_before_the_first_step(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr("mdistiller.engine.callbacks.default.shutil.disk_usage", lambda path: usage)
    run = train(tmp_path, epochs=1)
    out = capsys.readouterr().out
    assert "low disk" in out
    assert out.index("low disk") < out.index(" 1/1 ")
    told = float(out.split("still to come take ")[1].split(" MB")[0]) * 1e6 / 4
    assert told == pytest.approx((run / "latest").stat().st_size, rel=0.3)
