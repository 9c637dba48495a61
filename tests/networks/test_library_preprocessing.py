"""Plain state dicts of other libraries' networks: evaluated and run as teachers as there."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import write_config
from torchvision.datasets import ImageFolder

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import visualize as visualize_command
from mdistiller.dataset import load_data
from mdistiller.engine.cfg import load_config
from mdistiller.models import get_model_entry
from mdistiller.models.normalize import input_norm
from mdistiller.run.build import build_distiller
from mdistiller.run.measuring import measure_teacher, teacher_test_loader

timm = pytest.importorskip("timm")

CPU = torch.device("cpu")
NET, OTHER = "test_resnet", "test_efficientnet"  # 160 pixels, 0.95; bilinear and bicubic
DATA = ["DATASET.ZOO", "imagenet", "DATASET.NUM_WORKERS", "1"]
FAR = [[0.9] * 3, [0.1] * 3]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Six photographs of four shapes in val/, and nothing else."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    sizes = [(180, 260), (200, 170), (190, 190), (240, 180), (170, 300), (200, 200)]
    for k, size in enumerate(sizes):
        path = root / "val" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.NEAREST).save(path)
    return root


def network(name, seed=0):
    """A network of timm with random weights whose batch norms have seen data."""
    torch.manual_seed(seed)
    net = timm.create_model(name, num_classes=2)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    net.train()(torch.randn(8, 3, 160, 160))
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Plain state dicts of both networks, by name."""
    folder = tmp_path_factory.mktemp("files")
    for name in (NET, OTHER):
        torch.save(network(name).state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in (NET, OTHER)}


@torch.no_grad()
def by_timm(name, root):
    """Cross-entropy and accuracy in percent by timm's own network, transform and record."""
    net = network(name)
    view = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    images, targets = zip(*ImageFolder(root / "val", view), strict=True)
    logits, targets = net(torch.stack(images)), torch.tensor(targets)
    right = (logits.argmax(1) == targets).double().mean().item()
    return torch.nn.functional.cross_entropy(logits, targets).item(), 100 * right


def evaluated(tmp_path, root, *words):
    """What `eval` finds of each network, by JSON."""
    data = ["-d", "imagefolder", "DATASET.ROOT", str(root), *DATA]
    out = tmp_path / "out.json"
    assert eval_command.main([*map(str, words), "--json", str(out), *data]) == 0
    return json.loads(out.read_text())["networks"]


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_eval_is_that_of_the_library(photographs, files, tmp_path, capsys, loader):
    """With no key and no training images, and of two networks in one pass as of each alone."""
    words = [word for name in files for word in ("-m", f"timm/{name}", "-c", files[name])]
    found = evaluated(tmp_path, photographs, *words, "DATASET.LOADER", loader)
    for one, name in zip(found, files, strict=True):
        nll, top1 = by_timm(name, photographs)
        assert (one["nll"], one["top1"]) == (pytest.approx(nll, rel=1e-4), top1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "taken from timm" in line]
    assert len(lines) == 2
    assert f"{files[NET]} does not record" in lines[0]
    assert "[0.5, 0.5, 0.5]; 160 pixels; bilinear; crop, ratio 0.95" in lines[0]
    assert "DISTILLER.STUDENT_NORM" in lines[0]
    assert "DATASET.IMAGE_SIZE, INTERPOLATION, RESIZE, CROP_PCT" in lines[0]


def test_keys_and_files_that_say_otherwise_win(photographs, files, tmp_path, capsys):
    words = ["-m", f"timm/{NET}", "-c"]
    (plain,) = evaluated(tmp_path, photographs, *words, files[NET])
    for key, value in (
        ("DISTILLER.STUDENT_NORM", FAR),
        ("DATASET.INTERPOLATION", "bicubic"),
        ("DATASET.CROP_PCT", 0.7),
        ("DATASET.RESIZE", "stretch"),
        ("DATASET.IMAGE_SIZE", 128),
    ):
        (other,) = evaluated(tmp_path, photographs, *words, files[NET], key, value)
        assert other["nll"] != pytest.approx(plain["nll"], rel=1e-5), key
    (told,) = evaluated(
        tmp_path, photographs, *words, files[NET], "DISTILLER.STUDENT_NORM", FAR, *GEOMETRY
    )
    capsys.readouterr()
    recorded = tmp_path / "recorded.pth"
    torch.save({"model": torch.load(files[NET]), "norm": FAR}, recorded)
    (one,) = evaluated(tmp_path, photographs, *words, recorded, *GEOMETRY)
    assert one["nll"] == pytest.approx(told["nll"], rel=1e-4)
    assert "taken from" not in capsys.readouterr().out


GEOMETRY = ["DATASET.IMAGE_SIZE", 96, "DATASET.CROP_PCT", 0.9, "DATASET.INTERPOLATION", "bilinear"]


def teacher(tmp_path, file, *words):
    """(config, data, distiller) of KD from that file."""
    settings = {"method": "KD", "TEACHER": f"timm/{NET}", "TEACHER_CKPT": str(file)}
    path = write_config(tmp_path, **settings)
    cfg = load_config(path, [str(word) for word in words])
    data = load_data(cfg, CPU)
    return cfg, data, build_distiller(cfg, data, CPU)


def test_a_teacher_has_its_librarys_accuracy_and_constants(photographs, files, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(photographs / "val", root / "train")
    shutil.copytree(photographs / "val", root / "val")
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", root, *DATA]
    words += ["DISTILLER.STUDENT", "timm/test_vit", "SOLVER.BATCH_SIZE", 2]
    cfg, data, distiller = teacher(tmp_path, files[NET], *words, "DATASET.IMAGE_SIZE", 160)
    loader = teacher_test_loader(cfg, data, CPU, files[NET])
    assert measure_teacher(distiller, data, loader) == pytest.approx(by_timm(NET, root)[1])
    assert input_norm(distiller.teacher) == [[0.5] * 3] * 2
    assert input_norm(distiller.student) == [list(data.mean), list(data.std)]
    view = timm.data.create_transform(
        **{**timm.data.resolve_data_config({}, model=network(NET)), "mean": 0, "std": 1}
    )
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (data.mean, data.std))
    for image, (theirs, _) in zip(
        torch.cat([image for image, _ in loader]), ImageFolder(root / "val", view), strict=True
    ):
        torch.testing.assert_close(image * std + mean, theirs, rtol=0, atol=1e-5)
    capsys.readouterr()
    cfg, data, _ = teacher(tmp_path, files[NET], *words, "DATASET.IMAGE_SIZE", 128)
    assert next(iter(teacher_test_loader(cfg, data, CPU, files[NET])))[0].shape[2:] == (128, 128)
    assert "of 128 pixels, but its library evaluates it at 160" in capsys.readouterr().out


def test_small_square_sets_need_no_second_loader(files, tmp_path, capsys):
    file = tmp_path / "ten.pth"
    torch.save(timm.create_model(NET, num_classes=10).state_dict(), file)
    cfg, data, distiller = teacher(tmp_path, file)
    assert input_norm(distiller.teacher) == [[0.5] * 3] * 2
    assert teacher_test_loader(cfg, data, CPU, file) is None
    said = capsys.readouterr().out
    assert f"for timm/{NET}: mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] (to" in said
    assert "160 pixels" not in said  # what is not taken is not named


@pytest.mark.parametrize(
    ("config", "ours"),
    [("DATASET: {}\nDISTILLER: {}\n", True), ("model: {name: test_resnet}\n", False)],
)
def test_a_file_in_a_run_folder_keeps_the_datas_constants(tmp_path, capsys, config, ours):
    """Runs of earlier versions recorded none. Other trainers leave a config.yaml as well."""
    (tmp_path / "config.yaml").write_text(config)
    file = tmp_path / "student_latest"
    torch.save({"model": timm.create_model(NET, num_classes=10).state_dict()}, file)
    _, data, distiller = teacher(tmp_path, file)
    kept = [list(data.mean), list(data.std)] if ours else [[0.5] * 3] * 2
    assert input_norm(distiller.teacher) == kept
    assert ("taken from" in capsys.readouterr().out) != ours


def test_torchvision_says_it_by_the_name_of_the_file(tmp_path):
    entry = get_model_entry("torchvision/resnet50", "imagenet")
    for file, ratio in (("resnet50-0676ba61.pth", 224 / 256), ("other.pth", 224 / 232)):
        assert entry.preprocessing({}, file).crop_pct == ratio
    path = tmp_path / "resnet50-0676ba61.pth"
    path.touch()
    for file, ratio in ((path, 224 / 256), (f"{path}:state_dict", 224 / 256)):
        assert entry.preprocessing({}, file).crop_pct == ratio
    assert get_model_entry("resnet8", "cifar").preprocessing({}, "resnet8.pth") is None


def test_pictures_and_exports_take_it_too(photographs, files, tmp_path, capsys):
    words = [word for name in files for word in ("-m", f"timm/{name}", "-c", str(files[name]))]
    data = ["-d", "imagefolder", "DATASET.ROOT", str(photographs), *DATA]
    out = str(tmp_path / "a.png")
    assert visualize_command.main(["attention", *words, *data, "--out", out]) == 0
    more = ["--out", str(tmp_path / "files"), "--formats", "safetensors", "--no-latency"]
    assert export_command.main([*words[:4], *data, *more]) == 0
    assert capsys.readouterr().out.count("taken from timm") == 3
    card = (tmp_path / "files" / "README.md").read_text()
    assert "the shorter side is resized to 168 pixels (bilinear, antialiased)" in card
    assert "mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]" in card
