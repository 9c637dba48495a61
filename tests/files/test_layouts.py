"""One network in the files of many trainers: all are read, or refused with the keys named."""

import pickle
import re
import subprocess
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from support import same_state
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.cli.convert import checkpoint as convert_checkpoint
from mdistiller.cli.convert import worker
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_network


def resnet8(seed=0):
    torch.manual_seed(seed)
    return get_model_entry("resnet8", "cifar")(num_classes=10)


NET = resnet8()
STATE, OTHER, FRESH = (net.state_dict() for net in (NET, resnet8(1), resnet8(2)))
OPTIMIZER = torch.optim.SGD(NET.parameters(), 0.1, momentum=0.9)
for param in NET.parameters():
    OPTIMIZER.state[param]["momentum_buffer"] = torch.zeros_like(param)
BESIDE = {"epoch": 3, "best_acc": torch.tensor(71.5), "optimizer": OPTIMIZER.state_dict()}


def under(prefix, state=STATE):
    return {f"{prefix}{key}": value for key, value in state.items()}


def counted(state):
    """As after thop.profile, which leaves two counters at every module."""
    modules = {key.rpartition(".")[0] for key in state} | {"", "layer1"}
    names = [f"{m}.{c}".lstrip(".") for m in modules for c in ("total_ops", "total_params")]
    return {**state, **{name: torch.zeros(1, dtype=torch.float64) for name in names}}


def spoiled(key, value):
    broken = STATE[key].clone()
    broken.view(-1)[0] = value
    return {**STATE, key: broken}


def in_classifier(state):
    """mmpretrain's ImageClassifier."""
    return {
        ("head." if key.startswith("fc.") else "backbone.") + key: value
        for key, value in state.items()
    }


LIGHTNING = {"pytorch-lightning_version": "2.4", "callbacks": {}, "hparams": {"lr": 0.1}}

#: Contents of files that are read, and what is printed where there was a choice.
READ = {
    "bare": (STATE, ""),
    "model": ({"model": STATE, **BESIDE}, ""),
    "state_dict": ({"state_dict": STATE, **BESIDE}, ""),
    "net": ({"net": STATE, "acc": 71.5, "epoch": 3}, ""),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": {}}, ""),
    "params": ({"params": STATE}, ""),
    "weights": ({"weights": STATE, **BESIDE}, ""),
    "ema": ({"ema": STATE}, ""),
    "MODEL_STATE": ({"MODEL_STATE": STATE, "EPOCHS_RUN": 3}, ""),
    "deep": ({"state": {"trainer": {"net": STATE}}, "rng": torch.zeros(8).byte()}, ""),
    "model of state_dict": ({"model": {"state_dict": STATE}}, ""),
    "mmengine": ({"meta": {"epoch": 3}, "state_dict": in_classifier(STATE), **BESIDE}, ""),
    "Lightning": ({"state_dict": under("model."), **LIGHTNING}, ""),
    "Lightning with a loss": (
        {"state_dict": {**under("net."), "criterion.weight": torch.ones(10)}, **LIGHTNING},
        r"read state_dict\.net; .*\(state_dict\)",
    ),
    "average within a module": (
        {"state_dict": {**under("model.", OTHER), **under("model_ema.module.")}},
        r"read state_dict\.model_ema; .*\(state_dict\)",
    ),
    "deeper and of other shapes": (
        {"state_dict": under("moco.net.") | {"moco.queue": torch.eye(3)}},
        r"read state_dict\.moco\.net; ",
    ),
    "timm's average": (
        {"state_dict": OTHER, "state_dict_ema": STATE},
        r"read state_dict_ema; .*:KEY chooses another \(state_dict\)",
    ),
    "torchvision's average": (
        {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(9), **under("module.")}},
        r"read model_ema; .*:KEY chooses another \(model\)",
    ),
    "average of another network": (
        {"model": STATE, "generator_ema": {"w": torch.eye(3)}},
        r"read model; .*\(generator_ema\)",
    ),
    "AveragedModel": (AveragedModel(NET).state_dict(), ""),
    "DataParallel": ({"model": under("module.")}, ""),
    "compiled": ({"model": under("_orig_mod.")}, ""),
    "compiled, then parallel": ({"model": under("module._orig_mod.")}, ""),
    "parallel, then compiled": ({"model": under("_orig_mod.module.")}, ""),
    "model. in module.": ({"state_dict": under("module.model.")}, ""),
    "module. in model.": ({"state_dict": under("model.module.")}, ""),
    "backbone.": ({"state_dict": under("backbone.")}, ""),
    "timm_model.": (under("timm_model."), ""),
    "backbone and bare head": (
        {k if k.startswith("fc.") else f"backbone.{k}": v for k, v in STATE.items()},
        "",
    ),
    "thop": ({"state_dict": counted(under("module."))}, ""),
    "distiller": ({"model": under("module.student.") | under("module.teacher.", OTHER)}, ""),
    "run of ours with an average": (
        {"model": under("student."), "ema": {"model": OTHER}, **BESIDE},
        "",  # whose file of the average is another
    ),
    "networks of other shapes": (
        {
            "student": STATE,
            "teacher": get_model_entry("resnet14", "cifar")(num_classes=10).state_dict(),
        },
        r"read student; .*\(teacher\)",
    ),
    "half precision": ({"model": {k: v.half() if v.ndim else v for k, v in STATE.items()}}, ""),
    "parameters": (
        OrderedDict((k, nn.Parameter(v, v.is_floating_point())) for k, v in STATE.items()),
        "",
    ),
    "no counters": ({k: v for k, v in STATE.items() if "num_batches" not in k}, ""),
}
#: Contents that are refused, and the line.
REFUSED = {
    "two networks": (
        {"student": STATE, "teacher": OTHER},
        r"of several networks \(student, teacher\): name one, as .*:student$",
    ),
    "two wholes": (
        {"state_dict": {**under("encoder_q."), **under("encoder_k.", OTHER)}},
        r"several networks \(state_dict\.encoder_q, state_dict\.encoder_k\): name one",
    ),
    "nothing": ({"epoch": 3, "config": {"lr": 0.1}}, "no weights .*its keys are epoch, config$"),
    "NaN": (spoiled("bn1.running_var", float("nan")), r"NaN in 1 of 56 tensors .*bn1\.running_var"),
    "Inf": ({"net": spoiled("fc.bias", float("inf"))}, r"infinite values in 1 of .*fc\.bias"),
    "headless": (
        {"model": {k: v for k, v in STATE.items() if not k.startswith("fc.")}},
        r"no classifier of resnet8 \(fc.weight, fc.bias are missing\); .*features alone",
    ),
    "other classes": (
        get_model_entry("resnet8", "cifar")(num_classes=7).state_dict(),
        r"of a resnet8 for 7 classes, but 10 are wanted; .*features alone",
    ),
    "another network": (
        {"model": get_model_entry("wrn_16_1", "cifar")(num_classes=10).state_dict()},
        r"missing tensors \(layer1\..*unknown tensors \(block1",
    ),
    "whole numbers": (
        {"model": {k: v.to(torch.int8) for k, v in STATE.items()}},
        r"tensors that are not floating-point \(conv1.weight is int8",
    ),
    "a list": ([STATE], "holds no weights"),
}


def load(path):
    net = resnet8(2)
    load_network(net, path, "resnet8", 10)
    return net


@pytest.mark.parametrize("layout", READ)
def test_read(tmp_path, capsys, layout):
    contents, said = READ[layout]
    torch.save(contents, tmp_path / "file")
    state = load(tmp_path / "file").state_dict()
    want = {k: v.half().float() if v.is_floating_point() else v for k, v in STATE.items()}
    assert same_state(state, want if layout == "half precision" else STATE)
    out = capsys.readouterr().out
    assert re.search(said, out) if said else not out
    assert out.count("\n") == bool(said)


@pytest.mark.parametrize("layout", REFUSED)
def test_refused_in_a_line(tmp_path, layout):
    contents, line = REFUSED[layout]
    torch.save(contents, tmp_path / "file")
    net = resnet8(2)
    with pytest.raises(UserError, match=line) as caught:
        load_network(net, tmp_path / "file", "resnet8", 10)
    assert "\n" not in str(caught.value)
    assert same_state(net.state_dict(), FRESH)


@pytest.mark.parametrize("key", ["state_dict", "run.state_dict", "run.parts.module", "parts.one"])
def test_a_key_chooses(tmp_path, key):
    ones = {**under("module."), **under("other.", OTHER)}
    contents = {"run": {"state_dict": STATE, "state_dict_ema": OTHER, "parts": ones}}
    torch.save({**contents, "parts": {"one": STATE, "two": OTHER}}, tmp_path / "file")
    assert same_state(load(f"{tmp_path}/file:{key}").state_dict(), STATE)
    with pytest.raises(UserError, match=r"no weights under 'none'; it has run\.state_dict"):
        load(f"{tmp_path}/file:none")


class Mesh:
    """Stands for what makes a DTensor; pickled as torch pickles one."""

    def __init__(self, local, size):
        self.local, self.size = local, size

    def __reduce__(self):
        from torch.distributed.tensor import DTensor

        facts = (DTensor, torch.float32, self.size, (1,), 0, torch.strided, "cpu", False)
        state = ({"_local_tensor": self.local, "_spec": None}, {})
        wrap = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (wrap, DTensor, facts, state)


def converted(path, tmp_path):
    """What convert_checkpoint's reader makes of a file, in this process."""
    worker.main(str(path), str(tmp_path / "new"), "shells")
    return tmp_path / "new"


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda path: torch.jit.save(torch.jit.script(Bare()), path), "is a TorchScript program"),
        (lambda path: torch.save({"model": whole_shards()}, path), "holds DTensors"),
        (lambda path: torch.save(AveragedModel(NET), path), r"more than weights .*AveragedModel"),
        (
            lambda path: torch.save({"state_dict": STATE, "log": SimpleNamespace(a=1)}, path),
            r"more than weights .*SimpleNamespace",
        ),
        (
            lambda path: torch.save({"params": {k: v.numpy() for k, v in STATE.items()}}, path),
            r"more than weights .*multiarray\._reconstruct",
        ),
    ],
    ids=["TorchScript", "DTensors", "AveragedModel", "objects beside", "arrays"],
)
def test_what_is_refused_is_converted(tmp_path, write, line):
    write(str(tmp_path / "file"))
    with pytest.raises(UserError, match=rf"{line}.*convert_checkpoint\.py .*/file NEW"):
        load_checkpoint(tmp_path / "file")
    net = Bare() if line.startswith("is a TorchScript") else resnet8(2)
    load_network(net, converted(tmp_path / "file", tmp_path), "net")
    want = Bare().state_dict() if isinstance(net, Bare) else STATE
    assert same_state(net.state_dict(), want)


class Bare(nn.Module):
    """A network that TorchScript takes, with constant weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        for param in self.parameters():
            nn.init.constant_(param, 0.5)

    def forward(self, x):
        return self.body(x)


def whole_shards():
    return {k: Mesh(v, v.shape) if v.ndim else v for k, v in STATE.items()}


def test_a_part_of_the_shards_is_refused_by_the_conversion(tmp_path, capsys, monkeypatch):
    def in_this_process(words, **options):
        try:
            worker.main(*words[3:])
        except worker.ShardedError as error:
            return subprocess.CompletedProcess(words, 1, "", f"sharded: {error}")
        raise AssertionError("shards were taken for a whole")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    halves = {k: Mesh(v[: len(v) // 2], v.shape) if v.ndim else v for k, v in STATE.items()}
    torch.save({"model": halves}, tmp_path / "file")
    assert convert_checkpoint.main([str(tmp_path / "file"), str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"shard of each tensor \(\[8, 3, 3, 3\] of \[16, 3, 3, 3\]\): .*dcp_to_torch", error
    )
    assert error.count("\n") == 1
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").touch()
    with pytest.raises(UserError, match=r"a folder of shards: .*dcp_to_torch FOLDER FILE"):
        load_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize("layout", ["two networks", "nothing", "a list"])
def test_the_conversion_says_why_it_makes_nothing_of_a_plain_file(tmp_path, capsys, layout):
    contents, line = REFUSED[layout]
    torch.save(contents, tmp_path / "file")
    assert convert_checkpoint.main([str(tmp_path / "file"), str(tmp_path / "new")]) == 2
    assert re.search(line, capsys.readouterr().err.strip())
    assert not (tmp_path / "new").exists()


def test_a_key_of_a_plain_file_is_written_apart(tmp_path):
    torch.save({"student": STATE, "teacher": OTHER}, tmp_path / "file")
    words = [f"{tmp_path}/file:teacher", str(tmp_path / "new")]
    assert convert_checkpoint.main(words) == 0
    assert same_state(load(tmp_path / "new").state_dict(), OTHER)


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\x89HDF\r\n\x1a\n0000", "an HDF5 file"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"a": 1}', "a JSON file"),
        (pickle.dumps([1])[:-2], "truncated, damaged or not a PyTorch file"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, contents, what):
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(UserError, match=what):
        load_checkpoint(tmp_path / "file")
