"""How images are prepared is recorded in checkpoints, and counts wherever these are read."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_folder, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import train as train_command
from mdistiller.cli.convert import checkpoint as convert_checkpoint
from mdistiller.dataset import load_data
from mdistiller.engine.cfg import load_config
from mdistiller.preprocessing import read_preprocessing
from mdistiller.run.build import build_distiller
from mdistiller.run.measuring import measure_teacher, teacher_test_loader
from mdistiller.run_folder.folder import recorded_config
from mdistiller.weights import load_checkpoint

CPU = torch.device("cpu")
HOW = ["DATASET.IMAGE_SIZE", "40", "DATASET.RESIZE", "stretch", "DATASET.INTERPOLATION", "nearest"]
FILES = ("student_latest", "student_latest.safetensors", "latest")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Eight training and four test photographs of other shapes in each of two classes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for k in range(24):
        path = root / ("train" if k < 16 else "val") / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((60, 100) if k % 3 else (90, 50), Image.Resampling.NEAREST).save(path)
    return root


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """A run whose images were stretched to 40 pixels."""
    folder = tmp_path_factory.mktemp("run")
    config = str(write_config(folder, epochs=1))
    words = [*data_of(photographs), *HOW, "LOG.SAFETENSORS", "True"]
    assert train_command.main(["--cfg", config, *words]) == 0
    return next((folder / "out" / "toy").glob("run*"))


def data_of(root):
    return ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "SOLVER.BATCH_SIZE", "8"]


def loss(folder, *words):
    path = folder / "found.json"
    assert eval_command.main([*map(str, words), "--json", str(path), "DEVICE", "cpu"]) == 0
    return json.loads(path.read_text())["networks"][0]["nll"]


def plain(images, data):
    """Images before the data's normalisation."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (data.mean, data.std))
    return images * std + mean


@pytest.fixture(scope="module")
def wanted(run, tmp_path_factory):
    """The loss of its last weights."""
    return loss(tmp_path_factory.mktemp("wanted"), run, "--checkpoint", "latest")


@pytest.mark.parametrize("name", [*FILES, "converted", "exported"])
def test_a_file_is_evaluated_as_its_run_was(photographs, run, wanted, tmp_path, name):
    file = tmp_path / ("moved" + (run / name).suffix)
    if name == "converted":
        assert convert_checkpoint.main([f"{run}/latest:model.student", str(file)]) == 0
    elif name == "exported":
        words = [str(run), "--checkpoint", "latest", "--formats", "safetensors", "--no-latency"]
        assert export_command.main(["--out", str(tmp_path / "e"), *words]) == 0
        (file,) = (tmp_path / "e").glob("*.safetensors")
    else:
        shutil.copy(run / name, file)
    words = ["-m", "resnet8", "-c", file, *data_of(photographs)]
    assert loss(tmp_path, *words) == pytest.approx(wanted, rel=1e-5)
    for keys in (HOW[2:4], HOW[4:], HOW[:2]) if name == "latest" else ():
        value = {"stretch": "crop", "nearest": "bicubic", "40": "48"}[keys[1]]
        other = loss(tmp_path, *words, keys[0], value)
        assert other != pytest.approx(wanted, rel=1e-4), keys


def test_a_teacher_sees_what_its_file_records(photographs, run, tmp_path):
    file = shutil.copy(run / "student_latest", tmp_path / "teacher.pth")
    config = write_config(tmp_path, method="KD", TEACHER="resnet8", TEACHER_CKPT=str(file))
    cfg = load_config(config, [*data_of(photographs), *HOW[:2]])
    data = load_data(cfg, CPU)
    distiller = build_distiller(cfg, data, CPU)
    loader = teacher_test_loader(cfg, data, CPU, file)
    theirs = load_data(load_config(config, [*data_of(photographs), *HOW]), CPU)
    for (one, _), (other, _) in zip(loader, theirs.val, strict=True):
        torch.testing.assert_close(plain(one, data), plain(other, theirs), rtol=0, atol=1e-5)
    recorded = json.loads((run / "summary.json").read_text())["last_acc"]
    assert measure_teacher(distiller, data, loader) == pytest.approx(recorded, abs=1e-4)


def test_a_runs_teacher_is_checked_unless_an_earlier_version_measured_it(
    photographs, run, tmp_path, capsys
):
    file = shutil.copy(run / "student_latest", tmp_path / "teacher.pth")
    words = write_config(tmp_path, method="KD", epochs=1, TEACHER="resnet8", TEACHER_CKPT=str(file))
    words = ["--cfg", str(words), *data_of(photographs), *HOW[:2], "EXPERIMENT.NAME", "kd"]
    assert train_command.main(words) == 0
    kd = tmp_path / "out" / "toy" / "kd"
    record = json.loads((kd / "run.json").read_text())
    record["teacher_acc"] -= 50
    for code in (2, 0):
        (kd / "run.json").write_text(json.dumps(record))
        assert eval_command.main([str(kd), "DEVICE", "cpu"]) == code
        record["data"].pop("preprocessing", None)
        assert ("when it taught" in capsys.readouterr().err) == bool(code)


def test_an_export_without_the_data_takes_size_and_resizing_of_the_file(run, tmp_path):
    file = shutil.copy(run / "student_latest", tmp_path / "moved.pth")
    words = ["-m", "resnet8", "-c", str(file), "--num-classes", "2", "--out", str(tmp_path / "e")]
    assert export_command.main([*words, "--formats", "safetensors", "--no-latency"]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "Images of other sizes are resized to 40x40 (nearest, antialiased)." in card


def test_a_file_of_ours_needs_no_training_images_for_its_constants(
    photographs, run, wanted, tmp_path
):
    file = shutil.copy(run / "student_latest", tmp_path / "moved.pth")
    shutil.copytree(photographs / "val", tmp_path / "data" / "val")
    found = loss(tmp_path, "-m", "resnet8", "-c", file, *data_of(tmp_path / "data"))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_small_images_are_enlarged_as_in_training(run, tmp_path):
    """A library's input size does not count for them; one that a file records does."""
    root = image_folder(tmp_path / "small", ("a", "b"))
    file = shutil.copy(run / "student_latest", tmp_path / "moved.pth")
    words = ["-m", "resnet8", "-c", file, *data_of(root)]
    assert loss(tmp_path, *words) == pytest.approx(loss(tmp_path, *words, *HOW), rel=1e-5)


def test_images_that_kept_their_size_in_training_are_brought_to_it(run, tmp_path):
    contents = load_checkpoint(run / "student_latest")
    contents["data"]["preprocessing"] |= {"resize": "keep", "image_size": 32, "interpolation": ""}
    torch.save(contents, tmp_path / "moved.pth")
    for size in (32, 48):
        root = image_folder(tmp_path / str(size), ("a", "b"), size)
        words = ["-m", "resnet8", "-c", tmp_path / "moved.pth", *data_of(root)]
        same = loss(tmp_path, *words, "DATASET.IMAGE_SIZE", 32)
        assert loss(tmp_path, *words) == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"resize": "squash"}, {"crop_pct": "0.9"}, {"image_size": -3}, {"interpolation": "best"}],
)
def test_a_record_that_cannot_be_meant_is_one_line(photographs, run, tmp_path, capsys, wrong):
    contents = load_checkpoint(run / "student_latest")
    contents["data"]["preprocessing"] |= wrong
    torch.save(contents, tmp_path / "moved.pth")
    words = ["-m", "resnet8", "-c", str(tmp_path / "moved.pth"), *data_of(photographs)]
    assert eval_command.main(words) == 2
    said = capsys.readouterr().err
    assert "moved.pth records a preprocessing that cannot be meant" in said
    assert said.count("\n") == 1


def test_other_programs_entries_are_no_record():
    assert read_preprocessing(None) is read_preprocessing("crop") is None


def test_a_run_of_an_earlier_version_is_looked_at_and_continued_as_it_was(
    photographs, tmp_path, capsys
):
    """Before DATASET.RESIZE was a key photographs were stretched, by EXIF unturned."""
    words = ["--cfg", str(write_config(tmp_path, epochs=1)), *data_of(photographs)]
    words += ["DATASET.IMAGE_SIZE", "40"]
    older = ["DATASET.RESIZE", "stretch", "DATASET.EXIF", "False"]
    assert train_command.main([*words, *NAMED, *older]) == 0
    run = tmp_path / "out" / "toy" / "older"
    wanted = loss(tmp_path, run, "--checkpoint", "latest")
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
    assert wanted == pytest.approx(trained, rel=1e-6)  # bilinear by torchvision, not by Pillow
    config = (run / "config.yaml").read_text().splitlines()
    kept = [line for line in config if line.split(":")[0].strip() not in ("RESIZE", "EXIF")]
    (run / "config.yaml").write_text("\n".join([*kept, ""]))
    for name in ("student_latest", "student_best"):
        contents = load_checkpoint(run / name)
        torch.save({key: contents[key] for key in ("model", "norm")}, run / name)
    (run / "checkpoints.json").unlink()
    assert loss(tmp_path, run, "--checkpoint", "latest") == pytest.approx(wanted, rel=1e-5)
    capsys.readouterr()
    more = [*words, *NAMED, "--resume"]
    assert train_command.main(more) == 2
    assert "set DATASET.RESIZE stretch and DATASET.EXIF False" in capsys.readouterr().err
    assert train_command.main([*more, *older]) == 0
    assert "JPEG_SCALING: train" in (run / "config.yaml").read_text()


def test_a_run_from_before_jpeg_scaling_goes_on_decoding_in_full(photographs, tmp_path):
    words = ["--cfg", str(write_config(tmp_path, epochs=1)), *data_of(photographs)]
    words += ["DATASET.IMAGE_SIZE", "40", *NAMED]
    assert train_command.main(words) == 0
    config = tmp_path / "out" / "toy" / "older" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if "JPEG_SCALING" not in line))
    assert recorded_config(config.parent).DATASET.JPEG_SCALING == "none"
    assert train_command.main([*words, "--resume"]) == 0
    assert "JPEG_SCALING: none" in config.read_text()


NAMED = ["EXPERIMENT.NAME", "older"]
