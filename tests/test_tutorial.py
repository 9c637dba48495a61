"""The commands of docs/tutorial.md, in order, on a few small images and with small networks."""

import re
import shlex

import torch
from support import REPO, image_folder

from mdistiller.cli import main
from mdistiller.models import cifar_model_dict

PAGE = (REPO / "docs/tutorial.md").read_text()
SMALLER = {
    "timm/tf_efficientnet_lite0": "resnet8",
    "torchvision/shufflenet_v2_x0_5": "resnet8",
    "IMAGE_SIZE: 64, VAL_SPLIT: 80": "IMAGE_SIZE: 32, VAL_SPLIT: 6",
    "BATCH_SIZE: 32, EPOCHS: 12": "BATCH_SIZE: 6, EPOCHS: 1",
    "SOLVER.EPOCHS 3": "SOLVER.EPOCHS 1",
    "0001.jpg": "1.png",
    "--max-drop 10": "--max-drop 99 --formats onnx --no-latency",
}


def test_the_ten_commands_work_one_after_the_other(tmp_path, monkeypatch, capsys):
    text = PAGE
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "data/pictures")
    (tmp_path / "pictures.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    start = cifar_model_dict["resnet8"][0](num_classes=1000).state_dict()
    torch.save(start, "tf_efficientnet_lite0.pt")
    commands = re.findall(r"^mdistiller .*(?:\\\n.*)*", text.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 10
    said = []
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
        said.append(capsys.readouterr().out)
    assert "new: the classifier for 3 classes" in said[0]
    assert "from output/pictures/teacher/student_best" in said[1]
    assert "12 images; of 12 with a true class" in said[6]
    answers = [{word for word in said[k].split() if word in ("cat", "dog", "eel")} for k in (5, 8)]
    assert answers == [{"cat", "dog", "eel"}] * 2
    assert re.search(r"student_int8.onnx`\s*\|.*\|\s*[\d.]+\s*\|\s*$", said[7], re.MULTILINE)
    assert "(12 images): top-1" in said[9]
    files = ("report.html", "cells.png", "answers.csv", "deploy/README.md")
    assert all((tmp_path / name).stat().st_size for name in files)
