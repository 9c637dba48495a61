"""Whole runs on data read by workers, and with mixed images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import command, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.distillers import distiller_dict, get_distiller

STOPS = """
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError

@trainer_dict.register("stops")
class Stops(BaseTrainer):
    def train_epoch(self, epoch):
        mark = self.log_path / "seen"
        if epoch == 2 and not mark.exists():
            mark.touch()
            raise UserError("stopped")
        super().train_epoch(epoch)
"""


def refusal(folder, capsys, method, *words):
    """The line that a run ends with before it starts."""
    path = write_config(folder, method=method, TEACHER="resnet8")
    assert train_command.main(["--cfg", str(path), *words]) == 2
    assert not (folder / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("words", [("DATASET.MIXUP", "0.8"), ("DATASET.CUTMIX", "1.0")])
@pytest.mark.parametrize(
    ("method", "guilty"),
    [("DKD", "DKD"), ("CRD", "CRD"), ("KD+DKD", "DKD"), ("DKD+CRD", "DKD and CRD")],
)
def test_methods_that_need_classes_refuse_mixed_images(tmp_path, capsys, method, guilty, words):
    line = refusal(tmp_path, capsys, method, *words)
    assert line.startswith(f"error: DISTILLER.TYPE {method}: {guilty} cannot learn from mixed")
    assert "DATASET.MIXUP and DATASET.CUTMIX to 0" in line


SOFT = sorted(name for name, method in distiller_dict.items() if method.soft_labels)


def test_these_methods_take_soft_labels():
    classical = {"AT", "CC", "FITNET", "KD", "KDSVD", "LOGITS", "NONE", "NST", "OFD", "PKT", "RKD"}
    assert classical | {"REVIEWKD", "SP", "VID"} <= set(SOFT)
    assert not {"CRD", "DKD"} & set(SOFT)
    assert get_distiller("KD+AT").soft_labels
    assert not get_distiller("KD+DKD").soft_labels


@pytest.mark.parametrize("method", SOFT)
def test_a_method_that_takes_soft_labels_does(method):
    """One-hot probabilities give the loss of the classes they stand for."""
    from mdistiller.engine.cfg import default_config
    from mdistiller.models import get_model_entry

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    targets = torch.tensor([3, 1, 3, 9])
    soft = torch.nn.functional.one_hot(targets, 10).float()
    terms = []
    for target in (targets, soft):
        torch.manual_seed(0)
        nets = [get_model_entry(name, "cifar")(num_classes=10) for name in ("resnet8", "resnet14")]
        distiller = distiller_dict[method].build(*nets, default_config(), 64, image_size=(16, 16))
        _, losses = distiller.train()(image=images, target=target, index=torch.arange(4), epoch=1)
        terms.append(losses)
    assert terms[0].keys() == terms[1].keys()
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=1e-5, atol=1e-6)


def test_kd_trains_with_mixup_cutmix_and_erasing(tmp_path):
    words = ["DATASET.MIXUP", "0.8", "DATASET.CUTMIX", "1.0", "DATASET.ERASING", "0.25"]
    path = write_config(
        tmp_path, method="KD", TEACHER="resnet8", TEACHER_CKPT=str(saved_teacher(tmp_path))
    )
    assert train_command.main(["--cfg", str(path), *words, "EXPERIMENT.NAME", "run"]) == 0
    rows = (tmp_path / "out" / "toy" / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["train_loss_ce"] for row in rows]
    assert losses[1] < losses[0]
    assert losses[0] > 0.1  # a mean cross-entropy with soft labels, weight 0.1, is above that


def imagenet(root):
    """ImageNet's layout: 3 x 3 training and 3 x 2 validation JPEGs of many sizes."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n01443537", "n01484850"):
            for k in range(number):
                path = root / split / wnid / f"{wnid}_{k}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (70 + 9 * k, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    return root


def imagenet_words(folder):
    """Config and overrides of KD on that folder at 64 pixels."""
    teacher = saved_teacher(folder, "resnet14", num_classes=3)
    config = write_config(folder, method="KD", TEACHER="resnet14", TEACHER_CKPT=str(teacher))
    keys = {
        "DATASET.TYPE": "imagenet",
        "DATASET.ROOT": imagenet(folder / "data"),
        "DATASET.ZOO": "cifar",
        "DATASET.IMAGE_SIZE": 64,
        "DATASET.NUM_WORKERS": 1,
        "DATASET.TEST.BATCH_SIZE": 4,
        "SOLVER.BATCH_SIZE": 4,
        "EXPERIMENT.NAME": "run",
    }
    words = [str(word) for pair in keys.items() for word in pair]
    return ["--cfg", str(config), *words]


def student(folder):
    return torch.load(folder / "out" / "toy" / "run" / "student_latest", weights_only=True)["model"]


def test_imagenet_trains_with_kd_and_resumes(tmp_path):
    """Two epochs of three steps; a run of one epoch that is resumed ends with the same weights."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    assert train_command.main(imagenet_words(whole)) == 0
    words = imagenet_words(halves)
    (halves / "stop.py").write_text(STOPS)
    words += ["SOLVER.TRAINER", "stops", "--import", str(halves / "stop.py")]
    assert train_command.main(words) == 2
    assert train_command.main([*words, "--resume"]) == 0
    first, second = student(whole), student(halves)
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [
        json.loads(line)
        for line in (whole / "out" / "toy" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["train_loss"]) for row in rows)


def test_two_processes_train_on_imagenet(tmp_path):
    done = command(*imagenet_words(tmp_path), "SOLVER.EPOCHS", "1", processes=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "toy" / "run" / "summary.json").read_text())
    assert summary["epochs"] == 1
    assert summary["best_acc"] in [pytest.approx(100 * k / 6) for k in range(7)]


def test_a_corrupt_training_image_ends_a_run_with_its_path(tmp_path, capsys):
    words = imagenet_words(tmp_path)
    path = tmp_path / "data" / "train" / "n01443537" / "n01443537_1.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    assert train_command.main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {path} cannot be read as an image (")
