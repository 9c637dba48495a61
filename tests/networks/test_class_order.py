"""Which class an output is of: names in checkpoints, DATASET.CLASSES, teachers of other orders."""

import json

import pytest
import torch
from safetensors import safe_open
from support import image_folder, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data, load_test_loader, natural_key
from mdistiller.engine.cfg import load_config
from mdistiller.models import get_model_entry
from mdistiller.networks.class_order import reorder_outputs, swapped_classes
from mdistiller.registry import UserError

NUMBERED = ("class 1", "class 2", "class 10", "class 11")  # as timm orders them


def data_of(root, order=()):
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "SOLVER.BATCH_SIZE", "8"]
    return [*words, *(["DATASET.CLASSES", str(order)] if order else [])]


def perfect(root, order, path, name="resnet8", **contents):
    """A file of a network that is right on every test image, its classes numbered by `order`."""
    test = load_test_loader(load_config("", data_of(root, list(order))), torch.device("cpu"))
    images, targets = map(torch.cat, zip(*test.loader, strict=True))
    torch.manual_seed(0)
    net = get_model_entry(name, "cifar")(num_classes=len(order)).eval()
    with torch.no_grad():
        feats = net(images)[1]["pooled_feat"].double()
        ones = torch.ones(len(feats), 1, dtype=torch.double)
        wanted = torch.nn.functional.one_hot(targets, len(order)).double()
        solved = torch.linalg.lstsq(torch.cat([feats, ones], 1), wanted, driver="gelsd").solution
        net.classifier().weight.copy_(10 * solved[:-1].T)
        net.classifier().bias.copy_(10 * solved[-1])
    key = "model" if contents else "state_dict"  # ours; timm's
    torch.save({key: net.state_dict(), **contents}, path)
    return path


def top1(folder, *words):
    path = folder / "found.json"
    assert eval_command.main([*map(str, words), "--json", str(path), "DEVICE", "cpu"]) == 0
    return json.loads(path.read_text())["networks"][0]["top1"]


def kd(folder, root, teacher, *words):
    """A KD run of an epoch; returns the exit code."""
    distiller = {"TEACHER": "resnet8", "TEACHER_CKPT": str(teacher)}
    config = write_config(folder, method="KD", epochs=1, **distiller)
    return train_command.main(["--cfg", str(config), *data_of(root), *words])


def test_a_file_of_timm_is_right_in_timms_order_and_warned_about_in_ours(tmp_path, capsys):
    root = image_folder(tmp_path / "data", NUMBERED)
    file = perfect(root, NUMBERED, tmp_path / "timm.pth")
    words = ["-m", "resnet8", "-c", file]
    assert top1(tmp_path, *words, *data_of(root, "natural")) == 100
    assert "WARNING" not in capsys.readouterr().out
    assert top1(tmp_path, *words, *data_of(root)) == 25
    shown = capsys.readouterr().out
    assert "'class 10' in the data (plain sort) and 'class 2' in the natural order" in shown
    assert "DATASET.CLASSES natural" in shown


@pytest.mark.parametrize("key", ["list", "file", "map of more classes"])
def test_classes_are_numbered_as_the_key_says(tmp_path, capsys, key):
    root = image_folder(tmp_path / "data", ("cat", "dog", "eel"))
    names = ["eel", "cat", "dog"] if key != "map of more classes" else ["eel", "cat", "yak", "dog"]
    value = names
    if key != "list":
        value = tmp_path / "map.txt"
        value.write_text("\n".join(names) + "\n")
    plain = load_data(load_config("", data_of(root)), torch.device("cpu"))
    data = load_data(load_config("", data_of(root, value)), torch.device("cpu"))
    assert (data.classes, data.num_classes) == (names, len(names))
    for ours, others in ((data.train, plain.train), (data.val, plain.val)):
        assert [names[t] for t in ours.dataset.targets] == [
            plain.classes[t] for t in others.dataset.targets
        ]
    assert ("1 of 4 classes have no images" in capsys.readouterr().out) == ("yak" in names)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["cat"], "lacks the class 'dog'"),
        (["cat", "dog", "cat"], "names the class 'cat' 2 times"),
        ("nowhere.txt", "expected 'natural', a list of class names, or a text file"),
        (["cat", "", "dog"], "line 2 is empty"),
        ([["cat"]], "must be a list of names, or text"),
    ],
)
def test_a_bad_list_of_classes_is_refused(tmp_path, value, said):
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    with pytest.raises(UserError, match=said):
        load_data(load_config("", data_of(root, value)), torch.device("cpu"))


def test_every_checkpoint_names_its_classes_and_a_run_goes_on_with_no_others(tmp_path, capsys):
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    config = ["--cfg", str(write_config(tmp_path, epochs=1)), *data_of(root)]
    more = ["SOLVER.EMA", "0.5", "LOG.SAFETENSORS", "True", "LOG.SAVE_CHECKPOINT_FREQ", "1"]
    assert train_command.main([*config, *more]) == 0
    run = next((tmp_path / "out" / "toy").glob("run*"))
    names = ("latest", "best", "epoch_1", "student_latest", "student_best", "student_ema_best")
    for name in names:
        facts = torch.load(run / name, weights_only=True)["data"]
        assert (facts["classes"], facts["image_size"]) == (["cat", "dog"], [32, 32])
        assert len(facts["mean"]) == len(facts["std"]) == 3
    with safe_open(run / "student_latest.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["cat", "dog"]
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "yak")
    capsys.readouterr()
    assert train_command.main(["--resume", *config, *more]) == 2
    assert "class 0 is 'dog' in the data and 'cat' in the file" in capsys.readouterr().err
    for file in ("student_latest", "student_latest.safetensors"):
        assert eval_command.main(["-c", str(run / file), *data_of(root)]) == 2
        assert "'cat' in the file" in capsys.readouterr().err


def test_a_teacher_of_other_numbers_is_mapped_by_name(tmp_path, capsys):
    """Two classes the other way round, which taught silently: 0.00 %."""
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    facts = {"data": {"classes": ["dog", "cat"]}}
    file = perfect(root, ("dog", "cat"), tmp_path / "teacher.pth", **facts)
    code = kd(tmp_path, root, file)
    shown = capsys.readouterr().out
    assert code == 0
    assert "class 0 is 'cat' in the data and 'dog' in the file): mapped by name" in shown
    assert "M parameters, accuracy 100.00 %" in shown
    assert "WARNING" not in shown


def test_a_file_of_an_older_run_has_the_names_of_its_run(tmp_path, capsys):
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    file = perfect(root, ("dog", "cat"), tmp_path / "student_latest")
    assert top1(tmp_path, "-m", "resnet8", "-c", file, *data_of(root)) == 0
    (tmp_path / "run.json").write_text(json.dumps({"data": {"classes": ["dog", "cat"]}}))
    assert top1(tmp_path, "-m", "resnet8", "-c", file, *data_of(root)) == 100


def test_a_teacher_of_other_classes_is_refused_unless_the_names_are_not_compared(tmp_path, capsys):
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    facts = {"data": {"classes": ["chat", "chien"]}}
    file = perfect(root, ("cat", "dog"), tmp_path / "teacher.pth", **facts)
    code = kd(tmp_path, root, file)
    said = capsys.readouterr().err
    assert code == 2
    assert "class 0 is 'cat' in the data and 'chat' in the file" in said
    assert "DISTILLER.CHECK_CLASSES False" in said
    code = kd(tmp_path, root, file, "DISTILLER.CHECK_CLASSES", "False")
    assert (code, "M parameters, accuracy 100.00 %" in capsys.readouterr().out) == (0, True)


@pytest.mark.parametrize("method", ["AT", "KD"])
def test_a_teacher_of_as_many_other_classes_serves_methods_of_features(tmp_path, capsys, method):
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    facts = {"data": {"classes": ["car", "van"]}}
    file = perfect(root, ("cat", "dog"), tmp_path / "teacher.pth", **facts)
    distiller = {"TEACHER": "resnet8", "TEACHER_CKPT": str(file)}
    config = write_config(tmp_path, method=method, epochs=1, **distiller)
    code = train_command.main(["--cfg", str(config), *data_of(root)])
    shown = capsys.readouterr()
    assert code == (0 if method == "AT" else 2)
    assert ("AT reads its features alone" in shown.out) == (method == "AT")
    assert ("serves as a teacher of methods that read features" in shown.err) == (method == "KD")


def test_numbers_are_no_names_of_other_classes(tmp_path):
    """A file from shards, whose classes have numbers only, fits data with names."""
    root = image_folder(tmp_path / "data", ("cat", "dog"))
    facts = {"data": {"classes": ["0", "1"]}}
    file = perfect(root, ("cat", "dog"), tmp_path / "teacher.pth", **facts)
    assert top1(tmp_path, "-m", "resnet8", "-c", file, *data_of(root)) == 100


@pytest.mark.parametrize("order", [("dog", "cat"), NUMBERED], ids=["two", "four"])
def test_a_teacher_whose_answers_are_a_permutation_gets_a_warning(tmp_path, capsys, order):
    root = image_folder(tmp_path / "data", order)
    file = perfect(root, order, tmp_path / "teacher.pth")
    code = kd(tmp_path, root, file)
    shown = [line for line in capsys.readouterr().out.splitlines() if "WARNING: resnet8" in line]
    first, other = sorted(order)[1], sorted(order)[0 if len(order) == 2 else 2]
    assert code == 0
    assert any("is near chance on this data" in line and str(file) in line for line in shown)
    assert any("takes classes for one another" in line for line in shown)
    assert any(f"{first!r} for " in line and f" for {other!r}" in line for line in shown)


def test_classes_that_are_swapped_and_classes_that_are_hard():
    good = torch.full((12, 12), 0.5) + 14 * torch.eye(12)
    assert swapped_classes(good) == {}
    swapped = good.clone()
    swapped[[3, 8]] = good[[8, 3]]
    assert swapped_classes(swapped) == {3: 8, 8: 3}
    one_way = good.clone()
    one_way[3] = good[8]  # much like another class, which itself is well told
    assert swapped_classes(one_way) == {}
    few = torch.eye(1000)
    few[[3, 8]] = few[[8, 3]]  # one image each
    assert swapped_classes(few) == {}
    assert swapped_classes(torch.full((4, 4), 5.0)) == {}


NETWORKS = ("resnet8", "vgg8", "MobileNetV2", "timm/vit_tiny_patch16_224")


@pytest.mark.parametrize("name", NETWORKS)
def test_reordered_outputs_are_those_of_the_network(name):
    order = torch.tensor([2, 0, 3, 1])
    settings = {"image_size": (32, 32)} if "/" in name else {}
    net = get_model_entry(name, "cifar")(num_classes=4, **settings).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.nn.init.normal_(net.classifier().bias)
        before = net(images)[0]
        assert reorder_outputs(net, order, (32, 32))
        assert torch.allclose(net(images)[0], before[:, order], rtol=1e-4, atol=1e-5)


def test_outputs_that_a_classifier_alone_does_not_make_are_left_and_refused(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)
            self.scale = torch.nn.Parameter(torch.tensor([1.0, 3.0]))

        def classifier(self):
            return self.fc

        def forward(self, image):
            return self.fc(image.mean((2, 3))) * self.scale, {}

    net = Odd()
    before = net.fc.weight.clone()
    assert not reorder_outputs(net, torch.tensor([1, 0]), (8, 8))
    assert torch.equal(net.fc.weight, before)


def test_natural_order_is_timms():
    misc = pytest.importorskip("timm.utils.misc")
    names = ["b10", "B2", "a", "A1", "10", "9", "x2y10", "x2y9", "_", "ü", "n02", "n1"]
    assert sorted(names, key=natural_key) == sorted(names, key=misc.natural_key)
