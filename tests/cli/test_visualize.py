"""ImageFiles of networks: what they show, their files, and the notebooks that make the same."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPO, TOY, image_folder, saved_teacher

from mdistiller.cli import visualize
from mdistiller.dataset import load_test_loader
from mdistiller.engine.cfg import load_config
from mdistiller.evaluation import draw
from mdistiller.models import get_model_entry

NOTEBOOKS = sorted((REPO / "tools" / "visualizations").glob("*.ipynb"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Command words that name a student and a teacher, both untrained, and the toy data."""
    folder = tmp_path_factory.mktemp("nets")
    student, teacher = (saved_teacher(folder, name) for name in ("resnet8", "resnet14"))
    names = ["-m", "resnet8", "-c", str(student)]
    taught = ["--teacher", "resnet14", "--teacher-ckpt", str(teacher)]
    return [*names, *taught, "-d", "toy", "--import", TOY, "DEVICE", "cpu"]


@torch.no_grad()
def outputs(words, name, option):
    """Logits and features of one of the networks for the whole test set, made by hand."""
    cfg = load_config("", ["DATASET.TYPE", "toy"], [TOY])
    images, targets = zip(*load_test_loader(cfg, torch.device("cpu")).loader, strict=True)
    net = get_model_entry(name, "cifar")(num_classes=10).eval()
    net.load_state_dict(torch.load(words[words.index(option) + 1])["model"])
    return (*net(torch.cat(images)), torch.cat(targets))


def shown(axes):
    """The array behind a picture's image."""
    return np.asarray(axes.images[0].get_array())


def test_every_class_has_a_colour_and_a_long_name_two_lines():
    for count in (3, 10, draw.MOST_CLASSES):
        assert len(set(draw.colours(count))) == count
    names = ["fire engine, fire truck or a third long name", "cat"]
    told = ("net", [torch.rand(2, 4, 4)], [names[1], names[1]])
    figure = draw.attention(torch.rand(2, 3, 8, 8), names, [told])
    labels = [axes.yaxis.label for axes in figure.axes]
    assert max(len(line) for label in labels for line in label.get_text().split("\n")) <= 16
    assert [label.get_text() for label in labels[2:]] == ["\N{BALLOT X} says cat", "says cat"]
    assert labels[2].get_color() != labels[3].get_color()


def test_correlation_shows_numpys(words):
    figure = visualize.picture(["correlation", *words, "--classes", "7,2,4"])
    left, right = figure.axes[:2]
    names = (("resnet8", "-c"), ("resnet14", "--teacher-ckpt"))
    own, other = (
        np.corrcoef(outputs(words, *name)[0][:, [7, 2, 4]].double().numpy().T) for name in names
    )
    assert np.allclose(shown(left), other, atol=1e-5)
    assert np.allclose(shown(right), own - other, atol=1e-5)
    assert [label.get_text() for label in right.get_xticklabels()] == ["7", "2", "4"]
    assert f"{np.abs(own - other).mean():.3f}" in right.get_title()
    assert "teacher resnet14" in left.get_title()


def test_attention_shows_each_stage_of_both(words):
    figure = visualize.picture(["attention", *words, "--samples", "3", "--classes", "5"])
    logits, features, targets = outputs(words, "resnet8", "-c")
    picture, teacher, student = figure.subfigs
    assert len(picture.axes) == 3
    assert all(axes.get_ylabel() == "5" for axes in picture.axes)
    assert len(teacher.axes) == len(student.axes) == 9
    for i, axes in enumerate(student.axes):
        row, stage = divmod(i, 3)
        said, maps = logits.argmax(dim=1), features["feats"][stage + 1].square().mean(dim=1)
        near = [np.allclose(shown(axes), m, rtol=1e-4, atol=1e-5) for m in maps.numpy()]
        (place,) = np.flatnonzero(near)
        assert targets[place] == 5
        if stage == 0:
            mark = "" if said[place] == 5 else "\N{BALLOT X} "
            assert axes.get_ylabel() == f"{mark}says {said[place]}"
            digit = shown(picture.axes[row])
            assert digit.min() >= 0
            assert digit.max() <= 1
    assert teacher.get_suptitle().startswith("teacher resnet14")


def test_tsne_shows_the_chosen_images_of_each_class(words):
    figure = visualize.picture(["tsne", *words, "--samples", "20", "--classes", "1,4,7,8"])
    targets = outputs(words, "resnet8", "-c")[2]
    for axes in figure.axes:
        counts = {dots.get_label(): len(dots.get_offsets()) for dots in axes.collections}
        assert list(counts) == ["1", "4", "7", "8"]
        assert sum(counts.values()) == 20
        assert all(counts[str(k)] <= (targets == k).sum() for k in (1, 4, 7, 8))
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == [
        "teacher resnet14",
        "resnet8",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(counts)


@pytest.mark.parametrize("picture", visualize.PICTURES)
def test_files_are_the_same_twice_and_change_with_the_seed(picture, words, tmp_path, capsys):
    def written(name, *more):
        path = tmp_path / name
        few = ["--samples", "1" if picture == "attention" else "12", "--out", str(path), *more]
        assert visualize.main([picture, *few, *words]) == 0
        assert capsys.readouterr().out.strip() == str(path)
        return path

    svg = written("a.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    if picture == "tsne":  # the others draw nothing at random, and share how files are written
        assert written("c.svg", "--seed", "1").read_bytes() != svg
        assert written("b.svg").read_bytes() == svg
        return
    with Image.open(written("a.png")) as image:
        assert image.size > (500, 300)
        assert len(image.convert("L").getcolors()) > 20  # not blank


def test_an_image_folder_without_a_teacher(tmp_path):
    root = image_folder(tmp_path / "data", classes=("cat", "dog", "eel"))
    names = ["-m", "resnet8", "-c", str(saved_teacher(tmp_path, num_classes=3))]
    data = ["-d", "imagefolder", "DATASET.ROOT", str(root), "DATASET.LOADER", "workers"]
    more = ["DATASET.NUM_WORKERS", "0", "DEVICE", "cpu"]
    figure = visualize.picture(["attention", "--classes", "dog,eel", *names, *data, *more])
    labels = [axes.get_ylabel() for axes in figure.subfigs[0].axes]
    assert len(labels) == 5
    assert set(labels) == {"dog", "eel"}
    pixels = shown(figure.subfigs[0].axes[0])
    assert pixels.mean(axis=(0, 1)).argmax() == 1  # dogs are green


def test_bad_input_is_one_line(words, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "a.png")]
    alone = words[:4] + words[8:]
    for line, says in [
        (["tsne", *words], "name the file for the picture by --out"),
        (["tsne", *words, "--out", "a.gif"], "--out a.gif must end in .png or .svg"),
        (["tsne", *words, "--out", str(tmp_path / "no" / "a.png")], "does not exist"),
        (["tsne", *words, *out, "--samples", "0"], "--samples must be at least 1, got 0"),
        (["tsne", *words, *out, "--samples", "3"], "t-SNE needs at least 4 images, got 3"),
        (["tsne", *words, *out, "--classes", "cat"], "--classes: unknown class 'cat'"),
        (["correlation", *words, *out, "--classes", "1"], "between at least two classes"),
        (["correlation", *alone, *out], "a difference of correlations needs --teacher"),
    ]:
        assert visualize.main(line) == 2, line
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert visualize.main(["tsne", *words, *out]) == 2
    assert "pip install mdistiller[viz]" in capsys.readouterr().err


def test_the_notebooks_run_on_digits(tmp_path, monkeypatch):
    """The cells of each in its folder; without a kernel, and so without the magic of figures."""
    student, teacher = (str(saved_teacher(tmp_path, name)) for name in ("resnet8", "resnet14"))
    data = ["-m", "resnet8", "--teacher-ckpt", teacher, "-d", "digits", "DEVICE", "cpu"]
    settings = {"student": student, "teacher": "resnet14", "more": [*data, "--samples", "20"]}
    panels = {}
    for path in NOTEBOOKS:
        monkeypatch.chdir(path.parent)
        monkeypatch.setattr(sys, "path", [*sys.path])
        names = {}
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                lines = [line for line in cell["source"] if not line.startswith("%matplotlib")]
                exec("".join(lines), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= settings
        panels[path.stem] = len(names["figure"].axes)
    # two matrices with a colour bar each; two panels of points
    assert panels == {"correlation": 4, "tsne": 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
