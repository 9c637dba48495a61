"""Old checkpoints become plain ones; their code runs only where a user says that it may."""

import argparse
import os
import pickle
import sys
import types

import pytest
import torch
from support import same_state

from mdistiller.cli.convert import checkpoint as convert_checkpoint
from mdistiller.cli.convert import worker
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_network


def convert(*words):
    return convert_checkpoint.main([str(word) for word in words])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return get_model_entry("resnet8", "cifar")(num_classes=10)


class Touch:
    """Code in a pickle: writes its environment to a file, and gives a tensor."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        write = f"open({self.marker!r}, 'w').write(repr(dict(__import__('os').environ)))"
        code = f"({write}, __import__('torch').ones(3))[1]"
        return eval, (code,)


def read(source, target):
    """What the program that touches the file makes of it with shells, here in this process."""
    worker.main(str(source), str(target), "shells")
    return load_checkpoint(target)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", ["net", "parallel", "under a key"])
def test_a_whole_network_becomes_its_state(tmp_path, net, form, legacy):
    whole = net if form == "net" else torch.nn.DataParallel(net)
    saved = {"model": whole, "best_acc": 71.5} if form == "under a key" else whole
    torch.save(saved, tmp_path / "old", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"refused: .*tools/convert_checkpoint\.py .*/old NEW"):
        load_checkpoint(tmp_path / "old")
    found = read(tmp_path / "old", tmp_path / "new")
    assert (found.get("best_acc") == 71.5) == (form == "under a key")
    other = get_model_entry("resnet8", "cifar")(num_classes=10)
    load_network(other, tmp_path / "new", "resnet8", 10)
    assert same_state(other.state_dict(), net.state_dict())


def test_a_network_whose_code_is_gone(tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    exec("import torch\nclass Net(torch.nn.Module): pass", module.__dict__)
    module.Net.__module__ = "gone"
    monkeypatch.setitem(sys.modules, "gone", module)
    old = module.Net()
    old.fc = torch.nn.Linear(2, 3)
    old.register_buffer("scratch", torch.ones(1), persistent=False)
    torch.save(old, tmp_path / "old")
    monkeypatch.delitem(sys.modules, "gone")
    assert same_state(read(tmp_path / "old", tmp_path / "new")["model"], old.state_dict())


def test_code_beside_the_weights_does_not_run(tmp_path, net):
    marker = tmp_path / "marker"
    torch.save({"model": net.state_dict(), "more": Touch(marker)}, tmp_path / "old")
    assert same_state(read(tmp_path / "old", tmp_path / "new")["model"], net.state_dict())
    assert not marker.exists()


def test_what_a_checkpoint_of_ours_records_is_kept(tmp_path, net, monkeypatch):
    """Its classes and preprocessing were dropped, being a mapping."""

    def in_this_process(words, **_):
        worker.main(*words[-3:])
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(convert_checkpoint.subprocess, "run", in_this_process)
    facts = {"norm": [[0.5] * 3, [0.2] * 3], "data": {"classes": ["cat", "dog"]}}
    beside = {"log": types.SimpleNamespace(a=1)}
    torch.save({"model": net.state_dict(), **facts, **beside}, tmp_path / "old")
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    found = load_checkpoint(tmp_path / "new")
    assert {key: found[key] for key in facts} == facts


def test_weights_that_only_code_gives_want_trust(tmp_path, capsys, monkeypatch):
    """Given, it runs in an environment without the user's secrets."""
    marker = tmp_path / "marker"
    torch.save({"model": {"w": Touch(marker)}}, tmp_path / "old")
    with monkeypatch.context() as patch:  # found nothing without running it
        patch.setattr(convert_checkpoint, "_read", lambda path, mode: None)
        assert convert(tmp_path / "old", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert "runs whatever code it brings" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(UserError, match="was not converted"):
        convert_checkpoint._ask(tmp_path / "old", trust=False)
    assert not marker.exists()
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    seen = marker.read_text()
    assert "OMP_NUM_THREADS" in seen
    assert "secret" not in seen
    assert "HOME" not in seen
    assert load_checkpoint(tmp_path / "new")["model"]["w"].tolist() == [1, 1, 1]


def test_what_needs_no_conversion_and_what_is_none(tmp_path, net, capsys):
    torch.save({"model": net.state_dict(), "opt": argparse.Namespace(lr=0.1)}, tmp_path / "fine")
    assert load_checkpoint(tmp_path / "fine")["opt"].lr == 0.1
    assert convert(tmp_path / "fine", tmp_path / "new") == 0
    assert "needs no conversion" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    (tmp_path / "bad").write_bytes(pickle.dumps([1])[:-2])
    assert convert(tmp_path / "bad", tmp_path / "new") == 2
    assert "damaged" in capsys.readouterr().err
    assert convert(tmp_path / "fine", tmp_path / "bad") == 2
    assert "is there already" in capsys.readouterr().err
    assert os.listdir(tmp_path).count("new") == 0
