"""Figures show ground truth and the detections of teacher and students; names do no harm."""

import json

import nets
import numpy as np
import pytest
import torch
from PIL import Image
from synth import make_coco

from mdistiller.cli import visualize
from mdistiller.detection import visualize as drawing
from mdistiller.detection.config import load_config

SIZE = ["DETECTION.DATA.TEST_MIN_SIZE", "64", "DETECTION.DATA.MAX_SIZE", "120"]


def run_folder(folder, synth, net, *words, **settings):
    """A run's folder: its config and its student's last weights."""
    folder.mkdir()
    keys = {**nets.SMALL, **settings}
    student = [w for key, v in keys.items() for w in (f"DETECTION.STUDENT.{key}", str(v))]
    data = [*synth.keys("train"), *synth.keys("val"), *SIZE]
    cfg = load_config("", [*data, *student, "DEVICE", "cpu", *words])
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": net.state_dict(), "detector": net.facts}, folder / "student_latest")
    return folder


@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("set"), 5, split="val")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, synth):
    """Folders of a student, who was taught by the second one, and a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = run_folder(folder / "teacher", synth, nets.detector(seed=1))
    taught = ["DISTILLER.TYPE", "DKD"]
    taught += [w for k, v in nets.SMALL.items() for w in (f"DETECTION.TEACHER.{k}", str(v))]
    taught += ["DETECTION.TEACHER.WEIGHTS", str(teacher / "student_latest")]
    return run_folder(folder / "student", synth, nets.detector(), *taught), teacher


def figure(*words):
    return visualize.picture(["detections", *map(str, words)])


def panels(figure, columns):
    return [figure.axes[i : i + columns] for i in range(0, len(figure.axes), columns)]


def boxes(ax):
    """Corners of what is drawn, as (x1, y1, x2, y2), the first on top."""
    lines = [line.get_xydata() for line in ax.lines]
    return np.array([(*line.min(0), *line.max(0)) for line in lines]).reshape(-1, 4)[::-1]


def test_each_row_has_truth_teacher_and_student(runs, synth):
    drawn = figure(runs[0], "--samples", "2", "--seed", "3", "--threshold", "0.4")
    rows = panels(drawn, 3)
    assert len(rows) == 2
    assert [ax.get_title().split("\n")[0] for ax in rows[0]] == [
        "truth",
        "teacher",
        f"{runs[0].parent.name}/student latest",
    ]
    student, teacher = nets.detector().eval(), nets.detector(seed=1).eval()
    for truth, taught, own in rows:
        number = int(truth.get_ylabel().removeprefix("image "))
        record = next(r for r in synth.contents["images"] if r["id"] == number)
        found = [
            a for a in synth.contents["annotations"] if a["image_id"] == number and not a["iscrowd"]
        ]
        pixels = truth.images[0].get_array()
        scale = np.array(pixels.shape[1::-1]) / (record["width"], record["height"])
        assert min(pixels.shape[:2]) == 64
        corners = np.array([a["bbox"] for a in found])
        corners[:, 2:] += corners[:, :2]
        assert np.allclose(boxes(truth), corners * np.tile(scale, 2), atol=1e-3)
        names = {c["id"]: c["name"] for c in synth.contents["categories"]}
        assert [t.get_text() for t in truth.texts][::-1] == [names[a["category_id"]] for a in found]
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        for ax, net in ((taught, teacher), (own, student)):
            seen = net.detect([image], [tuple(image.shape[1:])])[0]
            keep = seen["scores"] >= 0.4
            assert keep.any()
            assert np.allclose(boxes(ax), seen["boxes"][keep].numpy(), atol=1e-2)
            assert ax.texts[-1].get_text().endswith(f" {float(seen['scores'][0]):.2f}")


def test_classes_and_threshold_choose(runs):
    every = figure(runs[0], "--samples", "2", "--threshold", "0.4")
    few = figure(runs[0], "--samples", "2", "--threshold", "0.4", "--classes", "box")
    none = figure(runs[0], "--samples", "1", "--threshold", "1")
    seen = [
        {text.get_text().split()[0] for ax in one.axes for text in ax.texts} for one in (every, few)
    ]
    assert seen[0] > seen[1] == {"box"}
    assert all(ax.lines for ax in few.axes[::3])  # images are chosen that have such
    assert not any(ax.lines for ax in [*none.axes[1::3], *none.axes[2::3]])


def test_the_command_writes_a_png(runs, tmp_path, capsys):
    out = tmp_path / "seen.png"
    words = ["detections", str(runs[1]), "--teacher", str(runs[0]), "--out", str(out)]
    assert visualize.main([*words, "--samples", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert min(Image.open(out).size) > 300


BAD = {
    "nowhere": "there is no run folder nowhere; name run folders",
    "": "name run folders of tools/train_detection.py",
    "RUN --threshold 2": "--threshold must be in 0..1",
    "RUN --classes disk": "unknown class 'disk'; did you mean 'disc'?",
    "RUN --checkpoint best": "has no checkpoint best (it has: latest)",
    "RUN --samples 0": "--samples must be at least 1",
    "RUN --teacher DATA": "is not a run folder: it has no config.yaml",
}


def test_bad_words_get_one_line(runs, synth, tmp_path, capsys):
    places = {"RUN": str(runs[0]), "DATA": str(synth.images)}
    wrong = []
    for words, message in BAD.items():
        given = [places.get(word, word) for word in words.split()]
        code = visualize.main(["detections", *given, "--out", str(tmp_path / "x.png")])
        lines = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
        if code != 2 or len(lines) != 1 or message not in lines[0]:
            wrong.append(f"{words}: {lines}")
    assert wrong == []


def test_masks_are_laid_over_the_image():
    masks = torch.zeros(2, 20, 30, dtype=torch.uint8)
    masks[1, 4:9, 5:7] = 1
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 4, 7, 9]])
    objects = drawing.Objects(boxes, torch.tensor([1, 2]), None, masks)
    kept = objects.only(torch.tensor([False, True]))
    assert kept.scores is None
    drawn = drawing.draw([torch.rand(3, 20, 30)], [[kept]], ["a"], ["b"], ["", "c", "d"])
    _, tint = (np.asarray(layer.get_array()) for layer in drawn.axes[0].images)
    assert np.array_equal(tint[..., 3] > 0, masks[1].numpy() > 0)


def test_names_from_files_do_no_harm(tmp_path):
    names = ["", "$\\frac{", "猫 \n\x1b[31m", "x" * 300, "caf\u00e9"]
    assert [drawing.plain(name) for name in names] == [
        "",
        r"\$\frac{",
        r"\u732b   [31m",
        "x" * 21 + "...",
        r"caf\xe9",
    ]
    objects = drawing.Objects(torch.tensor([[1.0, 1, 9, 9]] * 4), torch.arange(1, 5))
    drawn = drawing.draw([torch.rand(3, 20, 30)], [[objects]], ["$$"], ["$x"], names)
    drawn.savefig(tmp_path / "x.png")
    assert json.dumps(drawn.axes[0].texts[0].get_text()) == '"caf\\\\xe9"'
