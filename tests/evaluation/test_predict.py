"""predict: what it answers for images of one's own, in Python and as a command."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import saved_teacher

from mdistiller.cli import export as export_command
from mdistiller.cli import predict as predict_command
from mdistiller.cli import train as train_command
from mdistiller.engine.cfg import load_config
from mdistiller.evaluation import subjects
from mdistiller.evaluation.load import load_predictor
from mdistiller.evaluation.predict import Predictor, find_images, read_pixels
from mdistiller.export import usage
from mdistiller.preprocessing import RESIZE, Preprocessing
from mdistiller.registry import UserError

CLASSES = ("cat", "dog", "eel")
FILES = ("student.onnx", "student.pt2", "student.safetensors")


def photographs(root):
    """Images of all shapes and a class colour each, ten in three classes for each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(10):
            pixels = rng.integers(0, 120, (30 + 4 * i, 70 - 3 * i, 3), dtype=np.uint8)
            pixels[..., i % 3] += 100
            folder = root / split / CLASSES[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `data`, a `run` on it and the run's exported `files`."""
    folder = tmp_path_factory.mktemp("predict")
    photographs(folder / "data")
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(folder / "data")]
    words += ["DATASET.IMAGE_SIZE", "24", "DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
    words += ["DATASET.MEAN", "[0.4, 0.5, 0.6]", "DATASET.STD", "[0.2, 0.3, 0.4]"]
    words += ["DATASET.INTERPOLATION", "bicubic", "DATASET.CROP_PCT", "0.8", "DEVICE", "cpu"]
    words += ["SOLVER.BATCH_SIZE", "5", "EXPERIMENT.PROJECT", "p", "LOG.PREFIX", str(folder)]
    assert train_command.main([*words, "EXPERIMENT.NAME", "run"]) == 0
    (folder / "p" / "run").rename(folder / "run")
    to = ["--out", str(folder / "files"), "--no-latency"]
    assert export_command.main([str(folder / "run"), *to]) == 0
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def probabilities(predictor, paths):
    """[N, 3], in the order of CLASSES."""
    found = [dict(one.top) for one in predictor.predict(paths)]
    return torch.tensor([[row[name] for name in CLASSES] for row in found])


@torch.no_grad()
def test_every_form_of_a_network_answers_as_evaluation_does(there):
    (source,) = subjects.run_sources(there / "run", ["best"])
    cfg = subjects.data_config([source], [], [])
    test, (subject,) = subjects.load_all([source], cfg, torch.device("cpu"))
    batches = [(subject.net(image)[0].softmax(dim=1), target) for image, target in test.loader]
    wanted = torch.cat([batch[0] for batch in batches])
    assert wanted.std() > 0.01
    paths = find_images(Path("data/val"), CLASSES)
    assert [CLASSES.index(truth) for _, truth in paths] == [int(t) for _, ts in batches for t in ts]
    for name in ("run", "run/student_latest", *(f"files/{name}" for name in FILES)):
        predictor = load_predictor(name, device="cpu")
        found = probabilities(predictor, [path for path, _ in paths])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=name)
        assert predictor.classes == list(CLASSES)
        assert [one.truth for one in predictor.predict("data/val")] == [t for _, t in paths]


def test_a_file_that_takes_normalised_images_gets_them(there):
    words = ["--out", "bare", "--without-normalization", "--formats", "onnx", "torch"]
    assert export_command.main(["run", *words, "--no-latency", "--force"]) == 0
    paths = [path for path, _ in find_images(Path("data/val"))]
    wanted = probabilities(load_predictor("run", device="cpu"), paths)
    for name in ("bare/student.onnx", "bare/student.pt2"):
        torch.testing.assert_close(
            probabilities(load_predictor(name), paths), wanted, rtol=0, atol=1e-4
        )


def test_an_image_is_a_path_a_picture_or_pixels(there):
    predictor = load_predictor("run", device="cpu")
    path = "data/val/dog/1.png"
    with Image.open(path) as file:
        picture = file.copy()
    pixels = np.array(picture)
    wanted = predictor.predict(path, topk=2)
    assert len(wanted.top) == 2
    assert wanted.probability == max(p for _, p in wanted.top)
    for image in (Path(path), picture, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert predictor.predict(image, topk=2).top == wanted.top
    assert predictor.predict([path, picture], topk=2)[1].top == wanted.top
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert read_pixels(grey).tolist() == [grey.tolist()] * 3
    turned = Image.fromarray(grey)
    turned.getexif()[0x0112] = 6  # a quarter turn
    assert read_pixels(turned)[0].tolist() == np.rot90(grey, -1).tolist()
    assert read_pixels(turned, upright=False)[0].tolist() == grey.tolist()
    for wrong in (pixels / 255, pixels.transpose(2, 0, 1), Image.new("I;16", (4, 4)), 3):
        with pytest.raises(UserError, match=r"uint8 tensor|more than 8 bits"):
            predictor.predict([wrong])
    with pytest.raises(UserError, match="or a list of images, not 3"):
        predictor.predict(3)


def test_the_cards_code_reads_a_file_as_the_run_did(there, monkeypatch, capsys):
    """The image is turned by its EXIF orientation and has to be cut."""
    monkeypatch.chdir("files")
    turned = Image.open("../data/val/dog/1.png")
    turned.getexif()[0x0112] = 6
    turned.save("image.jpg", exif=turned.getexif())
    wanted = load_predictor("../run", device="cpu").predict("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names = {}
        exec(block, names)
        found = torch.as_tensor(names["logits"]).softmax(dim=1)[0].tolist()
        assert dict(zip(CLASSES, found, strict=True)) == pytest.approx(dict(wanted.top), abs=1e-4)
        assert capsys.readouterr().out == f"{wanted.label}\n"


def test_the_cards_preparation_is_that_of_training(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for how in (
        *(Preprocessing(resize=kind, interpolation="bicubic") for kind in RESIZE),
        *(Preprocessing(resize=kind, interpolation="nearest", crop_pct=0.7) for kind in RESIZE),
        Preprocessing(resize="crop", interpolation="bilinear", crop_pct=1.3),
        Preprocessing(resize="keep"),
    ):
        facts = {"image_size": (24, 24), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
        student = SimpleNamespace(preprocessing=how, dataset="digits", channels=3, **facts)
        student.cfg = load_config("", ["DATASET.TYPE", "digits"])
        names = {"np": np, "Image": Image, "ImageOps": ImageOps}
        exec(usage.preparation(student, raw=False), names)
        for height, width in ((37, 50), (50, 37), (24, 24), (9, 31)):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "a.png")
            found = names["prepare"](tmp_path / "a.png")
            assert found.dtype == np.float32
            kept = [(facts["image_size"]), (facts["mean"], facts["std"])]
            predictor = Predictor("", None, CLASSES, *kept, how, torch.device("cpu"))
            wanted = predictor.prepare(tmp_path / "a.png").float() / 255
            mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
            difference = (torch.from_numpy(found) * std + mean - wanted).abs().max()
            level = 1 / 255 if how.resize == "keep" else 0  # torchvision's bilinear
            assert float(difference) <= level + 1e-5, (how, height, width)


def run(capsys, *words):
    """(exit code, lines of output, lines of error)."""
    capsys.readouterr()
    code = predict_command.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_labelled_folder_as_csv_json_and_picture(there, capsys):
    words = ["--csv", "a.csv", "--json", "a.json", "--mistakes", "wrong.png", "--topk", 2]
    code, out, err = run(capsys, "files/student.onnx", "data/val", *words, "-bs", 3)
    assert (code, err) == (0, [])
    rows = list(csv.DictReader(io.StringIO(Path("a.csv").read_text())))
    answers = json.loads(Path("a.json").read_text())
    assert [row["image"] for row in rows] == [p for p, _ in find_images(Path("data/val"))]
    for row, answer in zip(rows, answers["images"], strict=True):
        assert row["truth"] == answer["truth"] == Path(row["image"]).parent.name
        assert row["class_2"] == answer["top"][1]["class"]
        assert float(row["probability_1"]) == answer["top"][0]["probability"] >= 1 / 3
    wrong = sum(row["truth"] != row["class_1"] for row in rows)
    assert 0 < wrong < 10
    percent = f"{100 - 10 * wrong:.2f}"
    assert out == [
        f"10 images; of 10 with a true class {wrong} wrong: top-1 {percent} %",
        "wrong.png",
    ]
    with Image.open("wrong.png") as picture:
        assert picture.width > 200


def test_mistakes_are_drawn_with_the_largest_loss_first(there, monkeypatch):
    from mdistiller.evaluation import draw, pictures

    predictor = load_predictor("run", device="cpu")
    found = predictor.predict("data/val")
    seen = []
    monkeypatch.setattr(draw, "grid", lambda images, captions, title: seen.extend(captions))
    pictures.mistakes_picture(predictor, found, most=3)
    worst = sorted((one for one in found if one.wrong), key=lambda one: dict(one.top)[one.truth])
    assert seen == [
        f"{one.truth} ({100 * dict(one.top)[one.truth]:.1f} %)\n"
        f"said {one.label} ({100 * one.probability:.1f} %)"
        for one in worst[:3]
    ]


def test_broken_images_are_a_line_each_and_the_exit_code_tells(there, capsys, monkeypatch):
    Path("broken.png").write_bytes(b"not an image")
    paths = ["data/val/cat/0.png", "broken.png", "", "gone.png", "data/val/eel/2.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(paths)))
    code, out, err = run(capsys, "run", "-", "--topk", 1, "--json", "b.json", "DEVICE", "cpu")
    assert (code, out) == (1, ["2 images; 2 could not be read"])
    assert [line.split()[1] for line in err] == ["broken.png", "gone.png"]
    found = json.loads(Path("b.json").read_text())
    assert [one["image"] for one in found["unreadable"]] == ["broken.png", "gone.png"]
    code, out, err = run(capsys, "run", paths[0], paths[-1], "--topk", 1)
    assert (code, len(out)) == (0, 3)
    for line, path, answer in zip(out, (paths[0], paths[-1]), found["images"], strict=False):
        (top,) = answer["top"]
        assert line == f"{path}  {top['class']} {100 * top['probability']:.1f} %"


def test_what_cannot_be_predicted_is_one_line(there, capsys, monkeypatch):
    for name in ("x.onnx", "x.pt2", "x.safetensors"):
        Path(name).write_bytes(b"nothing")
    bare = saved_teacher(there)
    Path("empty").mkdir(exist_ok=True)
    detector = there / "detector"
    detector.mkdir(exist_ok=True)
    (detector / "config.yaml").write_text("EXPERIMENT: {SEED: 1}\nDETECTION: {ARCH: x}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    image = "data/val/cat/0.png"
    for words, message in [
        (["run"], "name images, folders of images, or - for paths"),
        (["nowhere", image], "run folder or file nowhere does not exist"),
        (["data", image], "data is not a run folder: it has no config.yaml"),
        ([bare, image], "is neither in a run folder nor a .onnx, .pt2 or .safetensors file"),
        (["detector", image], "is the run of a detector"),
        *((["x." + suffix, image], f"x.{suffix} cannot be loaded") for suffix in ("onnx", "pt2")),
        (["x.safetensors", image], "x.safetensors cannot be loaded"),
        (["run", "--checkpoint", "epoch_9", image], "run has no checkpoint epoch_9"),
        (["run", "gone.png"], "image or folder gone.png does not exist"),
        (["run", "empty"], "folder empty has no images"),
        (["run", "-"], "standard input names no images"),
        (["run", image, "--topk", 0], "--topk and --batch-size must be at least 1"),
        (["run", image, "--csv", "no/a.csv"], "there is no folder no"),
        (["run", image, "--mistakes", "a.gif"], "--mistakes a.gif must end in .png or .svg"),
        (["run", image, "--mistakes", "a.png"], "--mistakes needs a folder with one folder per"),
        (["run", "data/val", "--device", "tpu"], "'tpu' is not a device"),
        (["files/student.onnx", image, "--device", "cuda"], "runs on the CPU"),
        (["files/student.onnx", image, "DATASET.EXIF", "False"], "is for run folders"),
        (["run", image, "DATASET.EXIV", "False"], "EXIV"),
    ]:
        code, _, err = run(capsys, *words)
        assert (code, len(err)) == (2, 1), (words, err)
        assert message in err[0], words
