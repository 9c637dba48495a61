"""DISTILLER.STUDENT_CKPT: what a student takes from a file of weights, and what it says."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import TOY, write_config

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers import Vanilla
from mdistiller.engine.cfg import load_config
from mdistiller.models import cifar_model_dict
from mdistiller.models.normalize import input_norm
from mdistiller.networks.network import build_network
from mdistiller.networks.start import with_channels

DATA = ["IMPORTS", [TOY], "DATASET.TYPE", "toy", "DEVICE", "cpu"]
NAMES = [str(k) for k in range(10)]


@pytest.fixture(scope="module")
def data():
    return load_data(load_config("", DATA))


def student(data, path, name="resnet8", *words):
    words = ["DISTILLER.STUDENT", name, "DISTILLER.STUDENT_CKPT", str(path), *words]
    torch.manual_seed(7)
    return build_network(load_config("", [*DATA, *words]), "STUDENT", data).state_dict()


def network(classes=10):
    torch.manual_seed(1)
    return cifar_model_dict["resnet8"][0](num_classes=classes)


def differ(first, second):
    return {k for k in first if first[k].shape != second[k].shape or (first[k] != second[k]).any()}


@pytest.mark.parametrize("form", ["plain", "nested", "checkpoint", "safetensors"])
def test_files_of_every_kind_are_taken_whole(tmp_path, data, form, capsys):
    net, path = network(), tmp_path / "weights"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(net.state_dict(), path)
    elif form == "checkpoint":
        torch.save({"epoch": 3, "model": Vanilla(net).state_dict()}, path)
    else:
        state = {f"module.{key}": value for key, value in net.state_dict().items()}
        torch.save(state if form == "plain" else {"model": net.state_dict()}, path)
    assert not differ(net.state_dict(), student(data, path))
    assert (
        f"student resnet8 starts from {path}: 47 of 47 tensors loaded\n" in capsys.readouterr().out
    )


def test_a_classifier_of_other_classes_is_new_and_all_else_is_loaded(tmp_path, data, capsys):
    head, path = {"fc.weight", "fc.bias"}, tmp_path / "w"
    torch.save(network(7).state_dict() | {"aux.weight": torch.ones(1)}, path)
    assert differ(network(7).state_dict(), student(data, path)) == head
    line = "45 of 47 tensors loaded; new: the classifier for 10 classes; not used: aux.weight\n"
    assert line in capsys.readouterr().out
    torch.save(network().state_dict() | {"neck.0.weight": torch.ones(4)}, path)  # of SimKD
    assert differ(network().state_dict(), student(data, path)) == head
    norm = [[0.1] * 3, [0.2] * 3]
    others = [f"animal {k}" for k in range(10)]
    torch.save({"model": network().state_dict(), "norm": norm, "data": {"classes": others}}, path)
    assert data.classes == NAMES
    named = [*data.classes]
    data.classes[:] = [f"digit {name}" for name in named]
    try:
        assert differ(network().state_dict(), student(data, path)) == head
        assert (
            "new: the classifier (the file's classes have other names)" in capsys.readouterr().out
        )
        unchecked = student(data, path, "resnet8", "DISTILLER.CHECK_CLASSES", "False")
        assert not differ(network().state_dict(), unchecked)
    finally:
        data.classes[:] = named


def test_the_same_classes_in_another_order_are_mapped_and_the_files_norm_is_kept(tmp_path, data):
    path, norm = tmp_path / "w", [[0.1] * 3, [0.2] * 3]
    facts = {"norm": norm, "data": {"classes": NAMES[::-1]}}
    torch.save({"model": network().state_dict(), **facts}, path)
    words = ["DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_CKPT", str(path)]
    net = build_network(load_config("", [*DATA, *words]), "STUDENT", data)
    assert torch.equal(net.fc.weight.flip(0), network().fc.weight)
    assert input_norm(net) == norm


def test_a_timm_network_of_other_images_is_resized(tmp_path, data, capsys):
    small = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, in_chans=1, **small)
    torch.save(net.state_dict(), tmp_path / "w")
    words = ["DISTILLER.STUDENT_ARGS", str(small)]
    found = student(data, tmp_path / "w", "timm/vit_tiny_patch16_224", *words)
    assert found["pos_embed"].shape == (1, 17, 12)
    grey = net.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(found["patch_embed.proj.weight"].sum(1, keepdim=True), grey)
    said = capsys.readouterr().out
    assert "resized: pos_embed from [1, 65, 12] to [1, 17, 12]" in said
    assert "patch_embed.proj.weight from [12, 1, 8, 8] to [12, 3, 8, 8]" in said
    assert "new: the classifier for 10 classes" in said


def test_a_first_convolution_keeps_its_answer_to_grey_images():
    torch.manual_seed(0)
    weight, grey = torch.randn(4, 3, 3, 3), torch.rand(1, 1, 8, 8)
    wanted = torch.nn.functional.conv2d(grey.expand(1, 3, 8, 8), weight)
    for channels in (1, 3):
        adapted = with_channels(weight, channels)
        got = torch.nn.functional.conv2d(grey.expand(1, channels, 8, 8), adapted)
        torch.testing.assert_close(got, wanted)
    assert torch.equal(with_channels(weight, 4)[:, 3], weight[:, 0] * 0.75)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"DISTILLER.STUDENT": "resnet8x4"}, r"nothing in .* fits the student resnet8x4 \(conv1"),
        ({"DISTILLER.STUDENT": "vgg8"}, r"vgg8 \(it begins with conv1.weight, the network with"),
        ({"DISTILLER.STUDENT_CKPT": "none.pth"}, "STUDENT_CKPT: none.pth does not exist"),
        ({"DISTILLER.STUDENT_ARGS": "{'pretrained': True}"}, "leave one of them out"),
        ({}, "has NaN in 1 of"),
    ],
)
def test_a_file_that_fits_nothing_is_one_line(tmp_path, capsys, change, says):
    state = network().state_dict()
    if not change:
        state["fc.bias"][3] = torch.nan
    torch.save(state, tmp_path / "w")
    config = write_config(tmp_path, STUDENT_CKPT=str(tmp_path / "w"))
    words = [word for pair in change.items() for word in pair]
    assert train_command.main(["--cfg", str(config), *words]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(says, line)
