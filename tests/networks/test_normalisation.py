"""Networks that see images normalised in their own way: every kind of step, files, evaluation."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from support import TOY as TOY_FILE
from support import saved_teacher, write_config
from test_training import load, train

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers import Vanilla, get_distiller
from mdistiller.engine.cfg import load_config
from mdistiller.engine.utils import validate
from mdistiller.models import ModelEntry, get_model_entry, imagenet_model_dict
from mdistiller.models.normalize import input_norm, renormalize_input
from mdistiller.networks.network import build_network
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller

CPU = torch.device("cpu")
OWN = [[0.5, 0.4, 0.6], [0.5, 0.25, 0.3]]
FAR = [[0.9] * 3, [0.1] * 3]
TOY = [[0.3] * 3, [0.4] * 3]


def run_parts(folder, method, *overrides, **settings):
    """(distiller, data) of the toy config."""
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    path = write_config(folder, method=method, **teacher, **settings)
    cfg = load_config(path, [str(word) for word in overrides])
    data = load_data(cfg, CPU, get_distiller(method).two_views)
    return build_distiller(cfg, data, CPU), data


def seen_by(net):
    """A list that gets what the first convolution of a resnet8 is given, from now on."""
    seen = []
    net.get_submodule("conv1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def in_float64(images, mean, std):
    """Images in [0, 1], normalised."""
    mean, std = (torch.tensor(part, dtype=torch.float64).view(3, 1, 1) for part in (mean, std))
    return (images.double() - mean) / std


@pytest.mark.parametrize(
    ("method", "loader"),
    [("KD", "workers"), *((m, "memory") for m in ("KD", "MLKD", "SIMKD"))],
)
def test_a_step_gives_each_network_its_own_normalisation(tmp_path, method, loader):
    keys = ["DATASET.LOADER", loader, "DATASET.NUM_WORKERS", 0, "SOLVER.BATCH_SIZE", 8]
    distiller, data = run_parts(tmp_path, method, *keys, TEACHER_NORM=OWN)
    _, plain = run_parts(
        tmp_path, method, *keys, "DATASET.MEAN", [0.0] * 3, "DATASET.STD", [1.0] * 3
    )
    teacher, student = seen_by(distiller.teacher), seen_by(distiller.student)
    image, target, index = next(iter(data.train))
    _, losses = distiller.train()(image=image, target=target, index=index, epoch=1)
    torch.stack(list(losses.values())).sum().backward()
    views = next(iter(plain.train))[0]
    views = views if isinstance(views, (list, tuple)) else [views]
    assert len(teacher) == len(student) == len(views)
    for theirs, ours, raw in zip(teacher, student, views, strict=True):
        torch.testing.assert_close(theirs.double(), in_float64(raw, *OWN), rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(ours.double(), in_float64(raw, *TOY), rtol=1e-5, atol=3e-6)


def test_teacher_accuracy_and_files_are_those_of_the_own_pipeline(tmp_path, capsys):
    """A network trained on images normalised by OWN is the same teacher, and student, elsewhere."""
    norm = ["DATASET.MEAN", OWN[0], "DATASET.STD", OWN[1]]
    (tmp_path / "own").mkdir()
    own = train(tmp_path / "own", *norm, "EXPERIMENT.NAME", "run", epochs=1)
    last = json.loads((own / "metrics.jsonl").read_text().splitlines()[-1])
    ckpt = str(own / "student_latest")
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CKPT": ckpt, "epochs": 1}
    run = train(tmp_path, TEACHER_NORM=OWN, STUDENT_NORM=OWN, **settings)
    assert json.loads((run / "summary.json").read_text())["teacher_acc"] == last["test_acc"]
    assert load(run / "student_latest")["model"].keys() == load(ckpt)["model"].keys()
    assert not [key for key in load(run / "latest")["model"] if "input_" in key]

    ours = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    words = ["-m", "resnet8", "-c", str(run / "student_latest")]
    assert eval_command.main([*words, "--cfg", str(run / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {ours['test_acc']:.2f}" in out
    assert f"loss {ours['test_loss']:.4f}" in out


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A run whose student's images are normalised far from the data's."""
    folder = tmp_path_factory.mktemp("far")
    torch.set_num_threads(1)
    return train(folder, text="SOLVER:\n  EMA: 0.5\n", epochs=1, STUDENT_NORM=FAR)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluation(capsys, file, *words):
    """What `eval` prints of a file that comes without its run's config."""
    capsys.readouterr()
    named = ["-m", "resnet8", "-c", str(file), "-d", "tiny16", "--import", TOY_FILE]
    assert eval_command.main([*named, *words]) == 0
    return capsys.readouterr().out.splitlines()[0].split(": ")[-1]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("student_latest", ""), ("latest", ""), ("student_ema_latest", "ema_")],
)
def test_a_runs_files_say_how_their_network_wants_images(far, capsys, name, prefix):
    assert load(far / name)["norm"] == FAR
    last = rows(far)[-1]
    for words in ([], ["DATASET.MEAN", "[0.5, 0.4, 0.3]", "DATASET.STD", "[0.2, 0.3, 0.4]"]):
        shown = evaluation(capsys, far / name, *words)
        assert f"top-1 {last[f'{prefix}test_acc']:.2f}" in shown
        assert f"loss {last[f'{prefix}test_loss']:.4f}" in shown
    wrong = evaluation(capsys, far / name, "DISTILLER.STUDENT_NORM", "data")  # config goes first
    assert f"loss {last[f'{prefix}test_loss']:.4f}" not in wrong


def test_an_exported_file_is_evaluated_and_exported_again_with_its_normalisation(
    far, tmp_path, capsys
):
    tiny = ["--formats", "safetensors", "--no-latency", "--out"]
    words = [str(far), "--checkpoint", "latest", *tiny, str(tmp_path / "one")]
    assert export_command.main(words) == 0
    file = tmp_path / "one" / "student.safetensors"
    assert f"loss {rows(far)[-1]['test_loss']:.4f}" in evaluation(capsys, file)
    for known in (["-d", "tiny16", "--import", TOY_FILE], ["--num-classes", "10"]):
        words = ["-m", "resnet8", "-c", str(file), *known, *tiny, str(tmp_path / "two"), "--force"]
        assert export_command.main(words) == 0
        with safe_open(tmp_path / "two" / "student.safetensors", "pt") as again:
            assert [json.loads(again.metadata()[key]) for key in ("mean", "std")] == FAR


def test_a_teachers_file_brings_its_normalisation(far, tmp_path):
    words = [str(far), "--checkpoint", "latest", "--formats", "safetensors", "--no-latency"]
    assert export_command.main([*words, "--out", str(tmp_path)]) == 0
    path = write_config(tmp_path, method="KD", TEACHER="resnet8")
    for file in (far / "student_latest", tmp_path / "student.safetensors"):
        cfg = load_config(path, ["DISTILLER.TEACHER_CKPT", str(file)])
        data = load_data(cfg, CPU)
        teacher = build_distiller(cfg, data, CPU).teacher
        assert validate(data.val, Vanilla(teacher))[0] == rows(far)[-1]["test_acc"]
        assert input_norm(teacher) == FAR
        words = ["DISTILLER.TEACHER_CKPT", str(file), "DISTILLER.TEACHER_NORM", OWN]
        told = build_distiller(load_config(path, words), data, CPU).teacher
        assert input_norm(told) == OWN
        assert input_norm(build_network(cfg, "STUDENT", data)) == TOY


@pytest.mark.parametrize("stated", ["imagenet", [[0.5] * 3, [0.0] * 3], [0.5, 0.5], 3])
def test_a_file_that_says_nonsense_is_named_with_what_to_do(tmp_path, stated):
    path = saved_teacher(tmp_path)
    torch.save({**load(path), "norm": stated}, path)
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CKPT": str(path)}
    cfg = load_config(write_config(tmp_path, **settings))
    data = load_data(cfg, CPU)
    with pytest.raises(UserError, match=r"resnet8_10.pth says .*; set DISTILLER.TEACHER_NORM to"):
        build_distiller(cfg, data, CPU)
    cfg = load_config(tmp_path / "toy.yaml", ["DISTILLER.TEACHER_NORM", "data"])
    assert not build_distiller(cfg, data, CPU).teacher._forward_pre_hooks


def test_a_last_digit_is_no_other_normalisation():
    net = get_model_entry("resnet8", "cifar")(num_classes=4)
    renormalize_input(net, TOY, [[0.3 + 1e-9] * 3, [0.4] * 3])
    assert not net._forward_pre_hooks
    renormalize_input(net, TOY, [[0.3 + 1e-4] * 3, [0.4] * 3])
    assert net._forward_pre_hooks


def test_a_validation_with_the_own_normalisation_equals_one_of_the_plain_network(tmp_path):
    distiller, data = run_parts(tmp_path, "KD", TEACHER_NORM=OWN)
    keys = ["DATASET.MEAN", OWN[0], "DATASET.STD", OWN[1]]
    plain, other = run_parts(tmp_path, "KD", *keys)
    first = validate(data.val, Vanilla(distiller.teacher))
    assert first == pytest.approx(validate(other.val, Vanilla(plain.teacher)), rel=1e-5)
    assert first != pytest.approx(validate(data.val, Vanilla(plain.teacher)), rel=1e-3)


def test_equal_normalisation_leaves_the_network_untouched(tmp_path):
    for norm in ("auto", "data", TOY):
        distiller, _ = run_parts(tmp_path, "KD", TEACHER_NORM=norm)
        assert not distiller.teacher._forward_pre_hooks
        assert not [name for name, _ in distiller.named_buffers() if "input_" in name]


def test_copies_and_moves_take_the_normalisation_along():
    net = get_model_entry("resnet8", "cifar")(num_classes=4).double().eval()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    want = net((image * 0.4 + 0.3 - 0.5) / 0.25)[0]
    keys = list(net.state_dict())
    renormalize_input(net, ((0.3,) * 3, (0.4,) * 3), ((0.5,) * 3, (0.25,) * 3))
    assert list(net.state_dict()) == keys
    twin = copy.deepcopy(net)
    net.input_factor.zero_()
    torch.testing.assert_close(twin.double()(image)[0], want, rtol=1e-5, atol=1e-6)
    assert twin.float()(image.float())[0].dtype == torch.float32


def test_released_weights_bring_their_normalisation_and_others_do_not(tmp_path, monkeypatch):
    """As the weights of ImageNet's zoo do; a file of the user's own was trained on the data."""
    path = saved_teacher(tmp_path, "ResNet18", zoo="imagenet")
    constructor = imagenet_model_dict["ResNet18"].constructor
    entry = ModelEntry(constructor, "torchvision:ResNet18_Weights.IMAGENET1K_V1")
    monkeypatch.setitem(imagenet_model_dict, "ResNet18", entry)
    monkeypatch.setattr("mdistiller.models.zoo.place_of", lambda checkpoint: path)
    config = write_config(tmp_path, method="KD", TEACHER="ResNet18")
    cfg = load_config(config, ["DATASET.TYPE", "toy_imagenet"])
    data = load_data(cfg, CPU)
    assert build_network(cfg, "TEACHER", data, path)._forward_pre_hooks
    own = saved_teacher(tmp_path, "ResNet18", seed=2, zoo="imagenet", num_classes=10)
    own = own.rename(tmp_path / "own.pth")
    assert not build_network(cfg, "TEACHER", data, own)._forward_pre_hooks
    (tmp_path / "elsewhere").mkdir()  # a copy has the name, in which torchvision puts a hash
    copied = shutil.copy(own, tmp_path / "elsewhere" / path.name)
    assert build_network(cfg, "TEACHER", data, copied)._forward_pre_hooks
    cfg = load_config(config, ["DATASET.TYPE", "toy_imagenet", "DISTILLER.TEACHER_NORM", "own"])
    assert build_network(cfg, "TEACHER", data, own)._forward_pre_hooks


@pytest.mark.parametrize(
    "value",
    [
        "[[0.5, 0.5, 0.5]]",
        "[[0.5, 0.5], [0.5, 0.5]]",
        "[[0.5, 0.5, 0.5], [0.5, 0.5, 0]]",
        "[[123, 117, 104], [58, 57, 57]]",
        "[0.5, 0.5]",
        "imagenet",
        "3",
    ],
)
@pytest.mark.parametrize("role", ["TEACHER", "STUDENT"])
def test_a_normalisation_that_is_none_is_refused_by_its_key(role, value):
    with pytest.raises(UserError, match=rf"DISTILLER.{role}_NORM must be auto, data, own or"):
        load_config("", [f"DISTILLER.{role}_NORM", value])


def test_own_needs_released_weights(tmp_path, capsys):
    path = write_config(tmp_path, STUDENT_NORM="own")
    assert train_command.main(["--cfg", str(path)]) == 2
    assert "DISTILLER.STUDENT_NORM own: resnet8 has no released" in capsys.readouterr().err


def test_a_teacher_keeps_the_normalisation_of_the_config_that_trains_it(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    teacher = write_config(
        tmp_path / "t", epochs=1, STUDENT_NORM=OWN, text="EXPERIMENT:\n  NAME: teacher\n"
    )
    settings = {"method": "KD", "TEACHER": "resnet8", "TEACHER_CFG": str(teacher), "epochs": 1}
    assert train_command.main(["--cfg", str(write_config(tmp_path, **settings))]) == 2
    assert "with STUDENT_NORM [[0.5, 0.4, 0.6], " in capsys.readouterr().err
    run = train(tmp_path, TEACHER_NORM=OWN, **settings)
    trained = json.loads((run.parent / "teacher" / "summary.json").read_text())
    assert json.loads((run / "summary.json").read_text())["teacher_acc"] == trained["last_acc"]
