"""Train, evaluate, export and predict on folders of images of unusual kinds."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import image_folder, saved_teacher, write_config

import mdistiller
from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import train as train_command


def train(folder, root, *words):
    """One epoch of resnet8 on an image folder; returns the run folder."""
    common = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", root, "DISTILLER.STUDENT", "resnet8"]
    common += ["SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "6", "LOG.PREFIX", folder]
    common += ["EXPERIMENT.NAME", "run", "DEVICE", "cpu"]
    assert train_command.main([*map(str, common), *words]) == 0
    return folder / "distill" / "run"


def test_without_test_images_the_held_out_ones_serve_for_both(tmp_path, capsys):
    root = image_folder(tmp_path / "images", size=16)
    shutil.rmtree(root / "val")
    run = train(tmp_path, root, "DATASET.VAL_SPLIT", "6")
    out = capsys.readouterr().out
    assert "has no test images (val/ or test/): the 6 held-out training images" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["selected_on"] == "6 held-out training images"
    assert "test_acc_best" not in summary
    assert eval_command.main([str(run), "--checkpoint", "latest", "--json", str(run / "e")]) == 0
    top1 = f"{summary['last_acc']:.2f}"
    assert f"(6 held-out training images): top-1 {top1}" in capsys.readouterr().out
    assert json.loads((run / "e").read_text())["split"] == "6 held-out training images"
    assert eval_command.main([str(run), "DATASET.VAL_SPLIT", "0"]) == 2
    assert "or set DATASET.VAL_SPLIT" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder whose images have several shapes, wide and tall."""
    root = image_folder(tmp_path_factory.mktemp("photographs"), size=48)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        shape = ((60, 44), (44, 60), (90, 30))[i % 3]
        Image.open(path).resize(shape, Image.Resampling.BILINEAR).save(path)
    return root


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_images_need_not_be_square(tmp_path, capsys, photographs, resize):
    words = ["DATASET.IMAGE_SIZE", "[24, 40]", "DATASET.RESIZE", resize]
    run = train(tmp_path, photographs, *words)
    state = torch.load(run / "student_latest", weights_only=True)
    assert state["data"]["preprocessing"]["image_size"] == (24, 40)
    accuracy = json.loads((run / "summary.json").read_text())["last_acc"]
    capsys.readouterr()
    for loader in ("memory", "workers"):  # and as its files record it, not as the config says
        more = ["DATASET.LOADER", loader, "DATASET.NUM_WORKERS", "0"]
        words = ["-m", "resnet8", "-c", run / "student_latest", "-d", "imagefolder"]
        words += ["DATASET.ROOT", photographs, *more]
        assert eval_command.main(list(map(str, words))) == 0
        assert f"top-1 {accuracy:.2f}" in capsys.readouterr().out
    assert export_command.main([str(run), "--formats", "safetensors", "--no-latency"]) == 0
    card = (run / "export" / "README.md").read_text()
    assert "float32 `[N, 3, 24, 40]`" in card
    code = re.search(r"def prepare.*?\n\n", card, re.S)[0]
    names = {"np": np, "Image": Image}
    exec("from PIL import ImageOps\n" + code, names)
    predictor = mdistiller.load(next((run / "export").glob("*.safetensors")))
    for path in sorted(photographs.rglob("0.png")):
        pixels = predictor.prepare(path)
        assert pixels.shape == (3, 24, 40)
        mean, std = (torch.tensor(v)[:, None, None] for v in predictor.normalization)
        difference = torch.from_numpy(names["prepare"](path)) - (pixels / 255 - mean) / std
        assert (difference * std * 255).abs().max() <= 2  # a level of Pillow's


def test_training_crops_are_of_the_shape_of_the_images():
    """The random crop keeps the picture's proportions as much as that to a square does."""
    from mdistiller.dataset.files.resized_crop import ResizedCropFlip

    crop = ResizedCropFlip((24, 48))._crop
    torch.manual_seed(0)
    places = [crop.make_params([torch.empty(3, 200, 400)]) for _ in range(50)]
    stretches = [place["width"] / place["height"] / 2 for place in places]
    assert 0.7 < min(stretches) < 0.9
    assert 1.1 < max(stretches) < 1.4


@pytest.mark.parametrize("size", ["[24]", "[24, 0]", "big", "-1"])
def test_a_size_that_cannot_be_meant_is_refused(tmp_path, capsys, size):
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(tmp_path)]
    assert train_command.main([*words, "DATASET.IMAGE_SIZE", size]) == 2
    assert "must be a side in pixels or [height, width]" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_four_channel_images_stay_so(tmp_path, photographs, capsys, channels, mode):
    words = ["DATASET.IMAGE_SIZE", "32", "DATASET.CHANNELS", str(channels)]
    run = train(tmp_path, photographs, *words)
    weight = torch.load(run / "student_latest", weights_only=True)["model"]["conv1.weight"]
    assert weight.shape[1] == channels
    accuracy = json.loads((run / "summary.json").read_text())["last_acc"]
    capsys.readouterr()
    more = ["DATASET.LOADER", "workers", "DATASET.NUM_WORKERS", "0"]
    assert eval_command.main([str(run), "--checkpoint", "latest", *more]) == 0
    assert f"top-1 {accuracy:.2f}" in capsys.readouterr().out
    assert export_command.main([str(run), "--formats", "safetensors", "--no-latency"]) == 0
    path = sorted(photographs.rglob("0.png"))[0]
    predictors = run, next((run / "export").glob("*.safetensors"))
    ours, file = (mdistiller.load(one).predict(path) for one in predictors)
    assert [name for name, _ in ours.top] == [name for name, _ in file.top]
    pixels = mdistiller.load(run).prepare(Image.open(path).convert(mode))
    assert torch.equal(pixels, mdistiller.load(run).prepare(path))
    assert pixels.shape == (channels, 32, 32)


@pytest.mark.parametrize(("size", "fed"), [("48", (48, 48)), ("[16, 20]", (32, 32))])
def test_the_teacher_may_see_images_of_another_size(tmp_path, photographs, capsys, size, fed):
    """The training crop is made at the larger size; the other network sees it resized."""
    seen = {"student": set(), "teacher": set()}

    class Spy(mdistiller.Hook):
        def before_train(self, trainer):
            for role, shapes in seen.items():
                conv = getattr(trainer.model, role).conv1
                conv.register_forward_pre_hook(
                    lambda _, x, shapes=shapes: shapes.add(tuple(x[0].shape[2:]))
                )
            assert next(iter(trainer.train_loader))[0].shape[2:] == fed

    teacher = ["TEACHER", "resnet8", "TEACHER_CKPT", saved_teacher(tmp_path, num_classes=3)]
    teacher += ["TEACHER_SIZE", size, "TEACHER_FOLD", "False"]
    settings = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", photographs]
    settings += ["DATASET.IMAGE_SIZE", "32", "DISTILLER.TYPE", "KD+AT", "LOG.PREFIX", tmp_path]
    settings += [f"DISTILLER.{x}" if i % 2 == 0 else x for i, x in enumerate(teacher)]
    settings += ["DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "8"]
    run = mdistiller.train({}, list(map(str, [*settings, "DEVICE", "cpu"])), hooks=[Spy()])
    sides = json.loads(size)
    assert seen["student"] == {(32, 32)}
    assert seen["teacher"] == {tuple(sides) if isinstance(sides, list) else (sides, sides)}
    state = torch.load(run.folder / "student_latest", weights_only=True)
    assert state["data"]["image_size"] == [32, 32]
    capsys.readouterr()
    assert eval_command.main([str(run.folder), "--checkpoint", "latest"]) == 0  # as it was measured
    out = capsys.readouterr().out
    for key in ("teacher_acc", "last_acc"):
        assert f"top-1 {run.summary[key]:.2f}" in out


def test_the_teacher_may_see_images_without_erasing(tmp_path, capsys):
    """The student's image is erased, the teacher's is the same crop; runs alike but for the key."""
    seen = {}

    class Spy(mdistiller.Hook):
        def before_train(self, trainer):
            for role in ("student", "teacher"):
                getattr(trainer.model, role).register_forward_pre_hook(
                    lambda _, x, role=role: seen.update({role: seen.get(role, x[0].clone())})
                )

    words = {"TYPE": "KD", "TEACHER": "resnet8", "STUDENT": "resnet8", "TEACHER_AUGMENT": "weak"}
    words["TEACHER_CKPT"] = saved_teacher(tmp_path)
    words["TEACHER_FOLD"] = "False"
    path = write_config(tmp_path, epochs=1)
    given = [str(x) for k, v in words.items() for x in (f"DISTILLER.{k}", v)]
    mdistiller.train(str(path), [*given, "DATASET.ERASING", "1"], hooks=[Spy()])
    erased = (seen["student"] == 0).all(dim=1)
    assert erased.flatten(1).any(dim=1).all()
    same = seen["student"] == seen["teacher"]
    assert same.movedim(1, -1)[~erased].all()
    assert not same.movedim(1, -1)[erased].any()
    refused = {
        "DATASET.ERASING 0": "neither DATASET.RANDAUGMENT nor ERASING is set",
        "DATASET.ERASING 1 DATASET.MIXUP 1": "make images of two",
        "DATASET.ERASING 1 DISTILLER.TYPE CRLD": "shows its teacher a weak and a strong view",
        "DATASET.ERASING 1 DISTILLER.TEACHER_CACHE memory": "make views without number",
        "DISTILLER.TEACHER_AUGMENT flip": "must be same or weak, got 'flip'",
    }
    for more, message in refused.items():
        assert train_command.main(["--cfg", str(path), *given, *more.split()]) == 2
        assert message in capsys.readouterr().err
