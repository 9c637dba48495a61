import os
import pickle

import numpy as np
import pytest
import torch
from support import same_state, saved_teacher

from mdistiller.engine.checkpoints import write as checkpoint
from mdistiller.engine.checkpoints.write import load_checkpoint, save_checkpoint
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError
from mdistiller.weights import load_network


def net(name="resnet8", classes=10):
    return get_model_entry(name, "cifar")(num_classes=classes)


def test_round_trip_leaves_one_file(tmp_path):
    save_checkpoint({"a": torch.arange(3), "b": 1.5}, tmp_path / "latest")
    assert load_checkpoint(tmp_path / "latest")["a"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, moment):
    path = tmp_path / "latest"
    save_checkpoint({"epoch": 1}, path)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, moment, full_disk)
    with pytest.raises(UserError, match=r"cannot write .*latest: No space left on device"):
        save_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, share):
    path = saved_teacher(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"checkpoint .*resnet8_10\.pth is (empty|truncated)"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="text is truncated, damaged or not a PyTorch file"):
        load_checkpoint(tmp_path / "text")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"model": Evil()}, tmp_path / "zip")
    (tmp_path / "plain").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("zip", "plain"):
        with pytest.raises(UserError, match="could run code"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_numpy_scalars_of_the_original_are_read(tmp_path):
    torch.save({"lr": np.float64(0.005), "best_acc": np.float32(7)}, tmp_path / "old")
    assert load_checkpoint(tmp_path / "old") == {"lr": 0.005, "best_acc": 7.0}


@pytest.mark.parametrize("form", ["model", "bare", "module.", "student.", "module.student."])
def test_all_forms_of_weights_load(tmp_path, form):
    source, target = net(), net()
    state = source.state_dict()
    if "." in form:
        state = {form + key: value for key, value in state.items()}
        if "student" in form:
            extra = form.replace("student", "teacher") + "conv1.weight"
            state[extra] = torch.zeros(1)
    torch.save(state if form == "bare" else {"model": state}, tmp_path / "ckpt")
    load_network(target, tmp_path / "ckpt", "resnet8", 10)
    assert same_state(source.state_dict(), target.state_dict())


def test_batch_norm_counters_may_be_missing_and_nothing_else(tmp_path):
    state = net().state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": old}, tmp_path / "old")
    target = net()
    load_network(target, tmp_path / "old", "resnet8", 10)
    assert torch.equal(target.fc.weight, old["fc.weight"])
    del old["fc.bias"]
    torch.save({"model": old}, tmp_path / "older")
    with pytest.raises(UserError, match=r"1 missing tensors \(fc\.bias\)"):
        load_network(target, tmp_path / "older", "resnet8", 10)


def test_other_architecture_and_class_count_are_told_apart(tmp_path):
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError, match=r"and network resnet8 do not fit together: \d+ missing"):
        load_network(target, saved_teacher(tmp_path, "vgg8"), "resnet8", 10)
    with pytest.raises(UserError, match="is of a resnet8 for 100 classes, but 10 are wanted"):
        load_network(target, saved_teacher(tmp_path, num_classes=100), "resnet8", 10)
    with pytest.raises(UserError, match="unknown tensors"):
        load_network(target, saved_teacher(tmp_path, "resnet14"), "resnet8", 10)
    assert same_state(before, target.state_dict())  # a refused file changes nothing
