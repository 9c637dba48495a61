"""Released teachers from a local server and from folders; every fault is one line."""

import io
import json
import os
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from file_server import serving
from support import same_state

from mdistiller.cli import download
from mdistiller.cli import eval as eval_command
from mdistiller.models import get_model_entry
from mdistiller.weights import load_checkpoint

FILES = {
    name: f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth" for name in ("resnet56", "wrn_40_2")
}


@pytest.fixture(scope="module")
def archive():
    """The original's archive with two small teachers: its bytes, and one's state."""
    stream, states = io.BytesIO(), {}
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, path in FILES.items():
            torch.manual_seed(0)
            content = io.BytesIO()
            states[name] = get_model_entry(name, "cifar")(num_classes=100).state_dict()
            torch.save({"model": states[name]}, content)
            info = tarfile.TarInfo(path)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    return stream.getvalue(), states


@pytest.fixture
def site(archive, monkeypatch):
    monkeypatch.setattr(sys.modules["mdistiller.files.fetch"], "PAUSE", 0)
    with serving(files={"cifar_teachers.tar": archive[0]}) as up:
        monkeypatch.setattr(download, "RELEASES", up.url)
        yield up


def get(folder, *words):
    return download.main([*words, "--to", str(folder)])


def refused(capsys, folder, *words):
    assert get(folder, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_one_archive_brings_all_teachers_through_cut_connections(site, archive, tmp_path):
    site.cut = [100_000, 1_000_000]
    assert get(tmp_path, "resnet56", "cifar/wrn_40_2") == 0
    assert get(tmp_path, "resnet56") == 0
    assert site.log == ["", "bytes=100000-", "bytes=1100000-"]
    assert visible(tmp_path) == ["cifar_teachers", "hashes.json"]
    for name, path in FILES.items():
        assert same_state(load_checkpoint(tmp_path / path)["model"], archive[1][name])
    record = json.loads((tmp_path / "hashes.json").read_text())
    assert sorted(record) == ["cifar_teachers.tar", *FILES.values()]
    assert record["cifar_teachers.tar"]["size"] == len(archive[0])


def test_a_file_that_is_no_longer_the_recorded_one_is_refused(site, tmp_path, capsys):
    assert get(tmp_path, "resnet56") == 0
    path = tmp_path / FILES["resnet56"]
    with path.open("ab") as file:
        file.write(b"x")
    assert "hashes.json says" in refused(capsys, tmp_path, "resnet56")
    path.unlink()
    site.files["cifar_teachers.tar"] += b"\0" * 512
    assert "expected" in refused(capsys, tmp_path, "resnet56")
    assert not path.exists()
    (tmp_path / "hashes.json").write_text("[1]")
    assert "hashes.json is damaged; remove it" in refused(capsys, tmp_path, "resnet56")


def test_an_archive_that_reaches_outside_leaves_nothing(site, tmp_path, capsys):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("cifar_teachers/../../evil"))
    site.files["cifar_teachers.tar"] = stream.getvalue()
    line = refused(capsys, tmp_path / "in", "resnet56")
    assert "holds a path that leads outside ('cifar_teachers/../../evil')" in line
    assert visible(tmp_path) == ["in"]
    assert visible(tmp_path / "in") == []


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    path = tmp_path / "mirror" / FILES["resnet56"]
    path.parent.mkdir(parents=True)
    torch.save({"model": get_model_entry("resnet8", "cifar")().state_dict()}, path)
    mirror = ["--from", str(tmp_path / "mirror")]
    assert "do not fit together" in refused(capsys, tmp_path / "to", "resnet56", *mirror)
    assert not (tmp_path / "to" / FILES["resnet56"]).exists()
    torch.save({"model": get_model_entry("resnet56", "cifar")().state_dict()}, path)
    assert get(tmp_path / "to", "resnet56", *mirror) == 0


def test_a_page_in_place_of_the_archive_is_not_kept(site, tmp_path, capsys):
    right = site.files["cifar_teachers.tar"]
    site.files["cifar_teachers.tar"] = b"<html>log in first</html>"
    refused(capsys, tmp_path, "resnet56")
    site.files["cifar_teachers.tar"] = right
    assert get(tmp_path, "resnet56") == 0


def test_mirrors(site, archive, tmp_path, capsys):
    """A folder with the archive, a folder with single files, another address."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cifar_teachers.tar").write_bytes(archive[0])
    assert get(tmp_path / "1", "resnet56", "--from", str(tmp_path / "a")) == 0
    assert get(tmp_path / "2", "wrn_40_2", "--from", str(tmp_path / "1")) == 0
    assert site.log == []
    assert get(tmp_path / "3", "wrn_40_2", "--from", site.url) == 0
    tiny = "tiny_imagenet_teachers/ResNet18_vanilla/ti_res18"
    assert "no address of tiny_imagenet/ResNet18" in refused(
        capsys, tmp_path / "4", "tiny_imagenet/ResNet18"
    )
    line = refused(capsys, tmp_path / "4", "tiny_imagenet/ResNet18", "--from", site.url)
    assert f"answers 404 Not Found); get {site.url}/{tiny}" in line


def test_names(tmp_path, capsys):
    assert get(tmp_path, "--list") == 0
    shown = capsys.readouterr().out
    assert all(f"cifar/{name} " in shown for name in FILES)
    assert "imagenet/ResNet50" in shown
    assert visible(tmp_path) == []
    assert "unknown released network 'resnet57'" in refused(capsys, tmp_path, "resnet57")
    assert "did you mean 'cifar/vgg13'?" in refused(capsys, tmp_path, "cifar/vgg14")


def test_verify_holds_the_accuracy_against_the_published_one(site, tmp_path, capsys, monkeypatch):
    asked = []

    def evaluate(args):
        asked.append(args)
        return [SimpleNamespace(quality=SimpleNamespace(top1=measured))]

    measured = 72.31
    monkeypatch.setattr(eval_command, "evaluate", evaluate)
    known = download.releases()
    monkeypatch.setattr(download, "releases", lambda: known)
    monkeypatch.setattr(download, "project_root", lambda: tmp_path)
    assert get(tmp_path / "to", "resnet56", "--verify") == 0
    assert "not evaluated: cifar100 is not in" in capsys.readouterr().out
    (tmp_path / "data" / "cifar-100-python").mkdir(parents=True)
    assert get(tmp_path / "to", "resnet56", "--verify") == 0
    assert "as published: 72.34 %" in capsys.readouterr().out
    assert [(args.model, args.dataset) for args in asked] == [(["resnet56"], "cifar100")]
    assert asked[0].ckpt == [str(tmp_path / "to" / FILES["resnet56"])]
    measured = 71.0
    assert get(tmp_path / "to", "resnet56", "--verify") == 2
    assert (
        "cifar/resnet56 has 71.00 % on cifar100, published are 72.34 %" in capsys.readouterr().err
    )


def test_every_released_cifar_teacher_has_a_published_accuracy():
    known = download.releases()
    for name, release in known.items():
        found = download.published_accuracy(release, download.DATA[release.zoo][0])
        assert (found is None) == (release.zoo == "tiny_imagenet"), name
    assert (
        download.published_accuracy(download.releases()["imagenet/ResNet34"], "imagenet") == 73.314
    )
