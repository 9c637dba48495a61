"""Teachers for other classes, and without a classifier, of methods that read only features."""

import json
import math

import pytest
import torch
from support import TOY, saved_teacher, write_config

from mdistiller.cli import eval as evaluate
from mdistiller.cli import train
from mdistiller.cli.support.probe import random_step, untrained
from mdistiller.distillers import Distiller, distiller_dict, get_distiller
from mdistiller.engine.stages import running
from mdistiller.models import get_model_entry

SIZE = (16, 16)
NAMES = [name for name, method in distiller_dict.items() if method.uses_teacher]


def losses(name, spoil):
    """All loss terms of a step, with the weights of the teacher's classifier NaN if asked."""
    distiller = untrained(name, "resnet14", "resnet8", 400, data=("cifar", SIZE, 100))
    if spoil:
        with torch.no_grad():
            distiller.teacher.classifier().weight.fill_(float("nan"))
    terms = []
    for stage in distiller.init_stages():
        with running(distiller, stage):
            terms += random_step(distiller, 8, size=SIZE).values()
    terms += random_step(distiller, 8, epoch=30, size=SIZE).values()
    return [term.item() for term in terms]


@pytest.mark.parametrize("name", NAMES)
def test_methods_say_whether_they_need_the_teachers_classifier(name):
    spoiled = losses(name, spoil=True)
    changed = any(map(math.isnan, spoiled)) or spoiled != losses(name, spoil=False)
    if name == "SIMKD":  # the student takes the layer over
        assert distiller_dict[name].needs_teacher_classifier
    else:
        assert changed == distiller_dict[name].needs_teacher_classifier


def test_a_sum_and_a_subclass_need_it_unless_they_say_otherwise():
    assert not get_distiller("AT+SP").needs_teacher_classifier
    assert get_distiller("AT+KD").needs_teacher_classifier

    class Mine(distiller_dict["AT"]):
        def distill(self, student, teacher, target, **batch):
            return teacher.logits.sum()

    assert Mine.needs_teacher_classifier
    assert Distiller.needs_teacher_classifier


def headless(folder):
    state = get_model_entry("resnet14", "cifar")(num_classes=7).state_dict()
    path = folder / "headless"
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("fc.")}}, path)
    return path


def of_other_classes(folder):
    return saved_teacher(folder, "resnet14", num_classes=7)


@pytest.mark.parametrize(
    ("make", "refusal"),
    [(headless, "has no classifier of resnet14"), (of_other_classes, "resnet14 for 7 classes")],
)
def test_such_a_teacher_serves_them_and_no_others(tmp_path, capsys, make, refusal):
    settings = {"TEACHER": "resnet14", "TEACHER_CKPT": str(make(tmp_path)), "epochs": 1}
    cfg = write_config(tmp_path, method="AT", **settings)
    assert train.main(["--cfg", str(cfg)]) == 0
    assert "no classifier for 10 classes; AT reads its features alone" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "toy" / "run" / "summary.json").read_text())
    assert summary.get("teacher_acc") is None
    cfg = write_config(tmp_path, method="KD", **settings)
    assert train.main(["--cfg", str(cfg), "EXPERIMENT.NAME", "kd"]) == 2
    error = capsys.readouterr().err
    assert refusal in error
    assert "serves as a teacher of methods that read features alone" in error
    assert error.count("\n") == 1


def test_a_key_chooses_the_teacher_in_a_file(tmp_path, capsys):
    nets = [get_model_entry("resnet14", "cifar")(num_classes=10).state_dict() for _ in range(2)]
    torch.save({"one": nets[0], "two": nets[1]}, tmp_path / "file")
    settings = {"method": "KD", "TEACHER": "resnet14", "epochs": 1}
    cfg = write_config(tmp_path, **settings, TEACHER_CKPT=str(tmp_path / "file"))
    assert train.main(["--cfg", str(cfg)]) == 2
    assert "of several networks (one, two): name one, as" in capsys.readouterr().err
    two = f"{tmp_path}/file:two"
    assert train.main(["--cfg", str(cfg), "DISTILLER.TEACHER_CKPT", two]) == 0
    words = ["-m", "resnet14", "-d", "tiny16", "--import", TOY]
    capsys.readouterr()
    assert evaluate.main([*words, "-c", two]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert evaluate.main([*words, "-c", two.replace("two", "one"), two]) == 0  # as further files
    second = capsys.readouterr().out.splitlines()[1]
    assert second.replace(f", {two},", "") == first
