"""The files of a run folder: hashes, what is kept, other formats, locks, room on the disk."""

import json
import os
import shutil
import socket
import time

import pytest
import torch
from filelock import FileLock
from support import same_state, write_config
from test_training import load

from mdistiller.cli import train as train_command
from mdistiller.engine import lock
from mdistiller.engine.checkpoint import load_checkpoint
from mdistiller.engine.store import Store, sha256
from mdistiller.registry import UserError


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
        assert files[name][0]["sha256"] == sha256(run / name)
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
            if str(args[-1]).endswith(("latest", "previous")):
                raise KeyboardInterrupt
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, moment, dies)
            with pytest.raises(KeyboardInterrupt):
                Store(copy).save(state(3), "latest")
        assert Store(copy).newest()[1]["epoch"] == 2
        Store(copy).save(state(4), "latest")
        assert [Store(copy).load(name)["epoch"] for name in ("latest", "previous")] == [4, 2]


def test_what_cannot_be_read_back_replaces_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(state(1), "latest")
    monkeypatch.setattr("mdistiller.engine.store.sha256", lambda path: "other")
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


def test_another_machine_is_believed_while_it_shows_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "STALE", 1.5)
    holder = tmp_path / ".holder"
    holder.write_text(json.dumps({"host": "elsewhere", "process": 7}))

    def sleep(seconds, original=time.sleep):
        original(seconds)
        holder.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.time, "sleep", sleep)
        with pytest.raises(UserError, match="written by process 7 on elsewhere"):
            lock.locked(tmp_path).__enter__()
    with lock.locked(tmp_path):  # it is silent now
        assert json.loads(holder.read_text()) == {
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        with lock.locked(tmp_path):  # the teacher's folder, by who needs it
            pass
    assert not holder.exists()


def test_low_disk_is_told_before_the_first_step(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr("mdistiller.engine.disk.shutil.disk_usage", lambda path: usage)
    run = train(tmp_path, epochs=1)
    out = capsys.readouterr().out
    assert "low disk" in out
    assert out.index("low disk") < out.index("epoch 1/1")
    told = float(out.split("still to come take ")[1].split(" MB")[0]) * 1e6 / 4
    assert told == pytest.approx((run / "latest").stat().st_size, rel=0.3)
